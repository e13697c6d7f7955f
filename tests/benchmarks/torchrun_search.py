"""A search's worker loop under plain torchrun, with which `multiprocess` compares Ray Train.

    torchrun --nproc-per-node 2 -m tests.benchmarks.torchrun_search CONFIG FOLDER

Checkpoints go to FOLDER, as Ray's workers send theirs; the records of the epochs to FOLDER/history.jsonl.
"""

import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.config.load import load
from pipeline.training.epoch_record import FolderStore, read_records
from pipeline.training.loop import search_worker
from pipeline.training.observer import Silent
from pipeline.training.pictures import open_dataset


def main(config_file: str, folder: Path) -> None:
    """Search with the ranks that torchrun has started."""
    dist.init_process_group("gloo")
    config = load(config_file)
    dataset = open_dataset(config, ("search",))
    done = search_worker(config, dataset, FolderStore(folder / "checkpoints"), Silent())
    if dist.get_rank() == 0:
        lines = [record.to_json() for record in read_records(folder / "checkpoints", done)]
        (folder / "history.jsonl").write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
