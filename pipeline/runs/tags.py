"""Names of the tags that runs and registered models have in MLflow.

`tracking.tracker` sends the tags of a run: those that follow from its record, and those that the job has added to
`RunRecord.tags`. Tags that link runs to each other are in `tracking.lineage`.
"""


class Tag:
    """The names of all tags."""

    # ----- Every run.
    KIND = "istanas.kind"  # search, retrain or sweep
    METHOD = "istanas.method"  # two_stage or one_stage
    DATASET = "istanas.dataset"  # name of the data set
    FOLDER = "istanas.data_folder"  # label of a picture folder, whose data set is always called "folder"
    MISSING_CLASSES = "istanas.missing_classes"  # classes without pictures in a part of the data set
    GENOTYPE = "istanas.genotype"  # digest of the genotype
    ORIGIN = "istanas.genotype_from"  # a run, a file, a random or a published cell
    SEED = "istanas.seed"  # seed of the run
    WORKERS = "istanas.workers"  # configured number of workers
    SECONDS = "istanas.seconds"  # seconds of training, without interruptions
    OUTCOME = "istanas.outcome"  # how the run ended, where MLflow's status does not say it
    KEY = "istanas.key"  # key by which a run directory finds its MLflow run again
    RUN_DIR = "istanas.run_dir"  # the run directory, or its address

    # ----- Trials of a sweep.
    SWEEP = "istanas.sweep"  # name of the sweep's run directory
    TRIAL = "istanas.trial"  # number of the trial
    TRIAL_STATE = "istanas.trial_state"  # Optuna's state of the trial
    NODE = "istanas.node"  # node of the cluster on which the trial ran
    REASON = "istanas.reason"  # why the trial failed

    # ----- Registered versions.
    PROMOTED = "istanas.promoted"  # why this version became the champion
    CHAMPION_BEFORE = "istanas.champion_before"  # the champion that this version replaced
