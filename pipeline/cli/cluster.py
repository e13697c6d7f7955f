"""The commands that use a cluster's job server: submit, jobs and stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pipeline.base.extras import check_extra
from pipeline.base.redaction import without_secrets
from pipeline.cli import search_and_train
from pipeline.cli.options import GIVEN_PLUGINS, Command, Function, hint_after_interrupt, json_option
from pipeline.cli.output import console_for, print_json, program_name
from pipeline.jobs.settings import load_config

if TYPE_CHECKING:
    from pipeline.cluster.job_server import Job, JobServer
    from pipeline.config.schema import Config


class _SubmitCommand(Command):
    """A command whose usage line shows that another command follows."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] -- COMMAND [ITS OPTIONS]"]


def server_option(command: Function) -> Function:
    """Add the option that names a cluster by the address of its dashboard."""
    return click.option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        default="http://127.0.0.1:8265",
        show_default=True,
        help="The cluster's dashboard, http://HOST:8265. Without it, RAY_API_SERVER_ADDRESS is used if it is set.",
    )(command)


@click.command(cls=_SubmitCommand, resumes=True, context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@server_option
@click.option(
    "--name",
    "job_id",
    metavar="ID",
    help="Name of the job, unique on the cluster. Without it, a name is generated.",
)
@click.option("--no-wait", is_flag=True, help="Return with exit code 0 as soon as the job is submitted.")
@click.option(
    "--cluster-mlflow", is_flag=True, help="Do not send MLFLOW_TRACKING_URI: use that of the cluster's nodes."
)
@json_option
@click.pass_context
def submit(
    context: click.Context,
    command: tuple[str, ...],
    address: str,
    job_id: str | None,
    no_wait: bool,
    cluster_mlflow: bool,
    as_json: bool,
) -> None:
    """Submit search, retrain, run or sweep to a Ray cluster as a job.

    The command is checked on this machine first. The working directory is sent along, without data, runs, well-known
    files of secrets, and the files that a .gitignore or .rayignore names. The job's log is shown, and the exit code is
    that of the job; 143 if it was stopped. After Ctrl-C (exit code 130) the job continues. The same command, submitted
    again, resumes its run.
    """
    check_extra("clusters", "submit")
    from pipeline.cluster.submit import Submission
    from pipeline.cluster.submit import submit as submit_job

    job, options, config, name = _parse(context, command)
    say = _say(as_json)
    submission = Submission(job, command, options, config, name, cluster_mlflow)
    listed = f"{program_name()} jobs --address {without_secrets(address)}"
    with hint_after_interrupt(f"the job may have been submitted; list the jobs: {listed}"):
        if job == "sweep" and not options.get("dry_run"):
            from pipeline.sweeps.space import check_space

            check_space(config)
        server, started = submit_job(submission, address, job_id, say)
    say(f"submitted {started} to {server.shown}, whose dashboard shows it, too")
    if no_wait:
        say(f"follow it: {program_name()} jobs {started} --follow --address {server.shown}")
        if as_json:
            print_json(server.job(started).as_json())
        return
    _follow(server, started, as_json)


@click.command(cls=Command)
@click.argument("job_id", metavar="[ID]", required=False)
@server_option
@click.option(
    "--follow", is_flag=True, help="Show the job's log from the beginning, and return the job's exit code."
)
@json_option
def jobs(job_id: str | None, address: str, follow: bool, as_json: bool) -> None:
    """List the jobs of a cluster, or show or follow one of them.

    The newest job is listed first. After Ctrl-C (exit code 130) a followed job continues.
    """
    if follow and job_id is None:
        raise click.UsageError("--follow: name the job, istanas jobs ID --follow")
    check_extra("clusters", "jobs")
    from pipeline.cluster.job_server import JobServer
    from pipeline.cluster.job_tables import job_table, jobs_table

    server = JobServer(address)
    console = console_for(as_json)
    if job_id is None:
        found = server.jobs()
        console.print(jobs_table(found) if found else "no jobs yet", crop=False)
        if as_json:
            print_json({"jobs": [job.as_json() for job in found]})
        return
    job = server.job(job_id)
    if follow:
        _follow(server, job.id, as_json)
    console.print(job_table(job))
    if as_json:
        print_json(job.as_json())


@click.command(cls=Command, resumes=True)
@click.argument("job_id", metavar="ID")
@server_option
@json_option
def stop(job_id: str, address: str, as_json: bool) -> None:
    """Stop a job of a cluster and wait until it has ended.

    Its run directory is kept, and the same command resumes the run. Exit code 0: the job has ended.
    """
    check_extra("clusters", "stop")
    from pipeline.cluster.job_server import SECONDS_TO_STOP, JobServer

    server, say = JobServer(address), _say(as_json)
    if server.job(job_id).exit_code is None:
        say(f"{job_id}: terminating, which may take {SECONDS_TO_STOP} s")
    with hint_after_interrupt(
        f"no longer waiting; show the job: {program_name()} jobs {job_id} --address {server.shown}"
    ):
        job, stopped = server.stop(job_id)
    if stopped:
        say(f"{job_id}: stopped; submit the same command again to resume")
    else:
        say(f"{job_id}: had already ended, {job.status} with exit code {job.exit_code}")
    if as_json:
        print_json(job.as_json())


def _parse(context: click.Context, command: tuple[str, ...]) -> tuple[str, dict[str, Any], Config, str]:
    """Parse the command to submit as if it ran here.

    Returns:
        Its name, its options, its configuration and the name of its runs.
    """
    from pipeline.cluster.submit import JOBS

    first, *rest = command
    inner = {job.name: job for job in search_and_train.COMMANDS if job.name in JOBS}.get(first)
    if inner is None:
        raise click.UsageError(f"COMMAND: {first!r:.40} can't be submitted, choose {', '.join(JOBS)}")
    parsed = inner.make_context(first, list(rest), parent=context.parent)
    options = {**parsed.params, "plugins": parsed.meta[GIVEN_PLUGINS]}
    placed_by = {key: options[key] for key in ("file", "overrides", "workers", "address")}
    config, name = load_config(**placed_by)
    return first, options, config, name


def _follow(server: JobServer, job_id: str, as_json: bool) -> None:
    """Show a job's log until the job ends, and exit with its exit code. Ctrl-C leaves the job running."""
    say = _say(as_json)

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)

    program, at = program_name(), f"--address {server.shown}"
    attach = f"Attach again: {program} jobs {job_id} --follow {at}; stop it: {program} stop {job_id} {at}"
    with hint_after_interrupt(f"detached, {job_id} continues. {attach}"):
        try:
            job = server.follow(job_id, write)
        except KeyboardInterrupt:
            if as_json:
                print_json(server.job(job_id).as_json())
            raise
    _say_end(job, say)
    if as_json:
        print_json(job.as_json())
    raise click.exceptions.Exit(1 if job.exit_code is None else job.exit_code)


def _say_end(job: Job, say: Callable[[str], None]) -> None:
    reason = f": {job.message}" if job.message else ""
    again = "" if job.exit_code == 0 else "; submit the same command again to resume"
    say(f"{job.id}: {job.status}, exit code {job.exit_code}{reason}{again}")


def _say(as_json: bool) -> Callable[[str], None]:
    """Return a function that writes a line for people: on stderr if a program reads stdout."""
    return lambda text: click.echo(text, err=as_json)


COMMANDS = (submit, jobs, stop)
