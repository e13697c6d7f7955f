#!/usr/bin/env bash
# Several Ray nodes on this machine, to try every cluster command without a cluster.
# They listen on 127.0.0.1 only, and require a token.
#
#   up      clusters/local.sh up 3        (number of nodes; default 2)       LOCAL_CPUS=1 clusters/local.sh up 3      (cores of each)
#           export RAY_AUTH_MODE=token
#   submit  istanas submit --address http://127.0.0.1:8265 -- search --config tune_configs/digits_quickstart.yaml --workers 3 \
#               --set runtime.runs_dir=$PWD/runs --set tracking.uri=sqlite:///$PWD/mlflow.db
#   watch   istanas jobs --address http://127.0.0.1:8265                   (`istanas stop ID` stops one)
#   fetch   nothing to fetch: the runs are in runs/, see `istanas results` and `istanas ui`
#   down    clusters/local.sh down                                          also: clusters/local.sh status
#
# Without the job server: istanas search --workers 3 --address 127.0.0.1:6379   (or auto)
#
# The token is read from RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token (created if missing, mode 600).
# Other ports: LOCAL_PORT, LOCAL_DASHBOARD_PORT. The folder LOCAL_STATE contains the state of the running cluster. The nodes
# have no GPUs: a machine with several of them needs no cluster, because `istanas search --workers N` uses all of them.
set -euo pipefail

STATE=${LOCAL_STATE:-/tmp/istanas-local-$(id -u)} # short: it contains Unix sockets
MARK=.istanas-local
PORT=${LOCAL_PORT:-6379}
DASHBOARD_PORT=${LOCAL_DASHBOARD_PORT:-8265}
SECONDS_TO_START=180
SECONDS_TO_STOP=30
VARIABLES= # variables that a user has to set in addition to RAY_AUTH_MODE

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$here/.venv/bin/python" || command -v python3)
fi

# `ray start` cannot run several nodes on 127.0.0.1 only, but Ray's own Cluster can. Its processes end with this one in any case.
read -r -d '' HOLDER <<'PYTHON' || true
import os, pathlib, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells start background jobs with SIGINT ignored, which jobs on the cluster would inherit.
if os.getpgrp() != os.getpid():
    os.setsid()  # Ctrl-C in the terminal must not reach the cluster.
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

state, (nodes, cpus, port, dashboard) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:])
own = {"node_ip_address": "127.0.0.1", "num_cpus": cpus}
own |= {"dashboard_agent_listen_port": None}  # any free port, because two clusters may run; without its agent, a node accepts no jobs
head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
head |= {"gcs_server_port": port, "node_name": "node1", "temp_dir": str(state / "1")}
cluster = Cluster(initialize_head=True, head_node_args={**own, **head})
try:
    for number in range(2, nodes + 1):
        # Each node has its own folder: in a common one, a node would replace the working folder of another node's job.
        cluster.add_node(**own, node_name=f"node{number}", temp_dir=str(state / str(number)))
    cluster.wait_for_nodes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (state / "1" / "ray_current_cluster").write_text(cluster.address)  # Without it, a job may join another cluster of this machine.
    while True:  # The job server is the last part to answer.
        try:
            JobSubmissionClient(f"http://{cluster.webui_url}").list_jobs()
            break
        except (ConnectionError, RuntimeError):
            time.sleep(0.5)
    (state / "ready").write_text(f"{nodes} nodes of {cpus} cores: {cluster.address}, http://{cluster.webui_url}\n")
    while cluster.head_node.remaining_processes_alive():
        time.sleep(1)
    sys.exit("the head node has died")
finally:
    cluster.shutdown()
PYTHON

fail() {
    echo "error: $*" >&2
    exit 1
}

# Print the process that runs the cluster, if it is alive. Its number in the file may belong to another process by now.
holder() {
    local pid command
    pid=$(cat "$STATE/pid" 2>/dev/null) || return 1
    command=$(ps -ww -o command= -p "$pid" 2>/dev/null) || return 1
    [[ $command == *" $STATE "* ]] || return 1 # grep -q would exit first, and make ps fail (pipefail)
    echo "$pid"
}

clear_state() { # leaves a folder that this script did not create
    if [ -e "$STATE/$MARK" ] && [ -O "$STATE" ]; then rm -rf "$STATE"; fi
}

make_token() {
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then return; fi
    local file=${RAY_AUTH_TOKEN_PATH:-${HOME:-}/.ray/auth_token}
    if [ ! -s "$file" ]; then
        if ! mkdir -p "$(dirname "$file")" 2>/dev/null || ! [ -w "$(dirname "$file")" ]; then
            fail "token: $file can't be written; set RAY_AUTH_TOKEN_PATH to a writable file, and export it for istanas, too"
        fi
        (umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
    fi
    if [ -O "$file" ]; then chmod 600 "$file"; fi # Ray itself creates it readable for every user
}

is_free() { # whether no process listens on a port of 127.0.0.1
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

up() {
    local nodes=$1 cpus=$2 pid port
    if pid=$(holder); then
        echo "already running, process $pid: $(cat "$STATE/ready" 2>/dev/null || echo starting)"
        return
    fi
    "$PYTHON" -c 'import ray.cluster_utils' 2>/dev/null || fail "PYTHON: $PYTHON has no Ray; run make .venv, or name another Python"
    for port in "$PORT" "$DASHBOARD_PORT"; do
        is_free "$port" || fail "port $port of 127.0.0.1 is in use; set LOCAL_PORT or LOCAL_DASHBOARD_PORT"
    done
    make_token
    clear_state # of a cluster that was killed
    mkdir -m 700 "$STATE" 2>/dev/null || fail "LOCAL_STATE: $STATE exists already; name a new folder"
    cd "$STATE"
    touch "$MARK"
    make_folder_of_ray
    if ! start "$nodes" "$cpus"; then
        # On a busy machine, a node may exceed Ray's own limit of 30 seconds.
        if ! grep -q "timed out during startup" log || ! start "$nodes" "$cpus"; then
            tail -n 5 log >&2
            down >/dev/null
            fail "the cluster did not start; see the lines above"
        fi
    fi
    cat ready
    echo "next: export RAY_AUTH_MODE=token$VARIABLES, and the commands at the top of clusters/local.sh"
}

# Ray writes the cluster's address for `--address auto` into its default folder, but does not create that folder if the head has
# another one. On a machine with several users, the folder or the file in it may belong to another user.
make_folder_of_ray() {
    local folder=${RAY_TMPDIR:-${TMPDIR:-/tmp}}/ray
    local file=$folder/ray_current_cluster
    if mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] && { [ ! -e "$file" ] || [ -w "$file" ]; }; then return; fi
    mkdir -p "$STATE/ray"
    export RAY_TMPDIR=$STATE
    VARIABLES=" RAY_TMPDIR=$STATE"
    echo "$folder can't be written (it may belong to another user): $STATE/ray is used; --address auto finds it by RAY_TMPDIR"
}

start() {
    local pid i
    env RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_USAGE_STATS_ENABLED=0 \
        MLFLOW_DISABLE_TELEMETRY=true PATH="$(dirname "$PYTHON"):$PATH" \
        "$PYTHON" -c "$HOLDER" "$STATE" "$1" "$2" "$PORT" "$DASHBOARD_PORT" >log 2>&1 </dev/null &
    pid=$!
    echo "$pid" >pid
    for ((i = 0; i < 5 * SECONDS_TO_START; i++)); do
        if [ -s ready ]; then return 0; fi
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.2
    done
    return 1
}

down() {
    local pid i
    cd /
    if pid=$(holder); then
        kill "$pid"
        for ((i = 0; i < 5 * SECONDS_TO_STOP; i++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
        kill -9 "$pid" 2>/dev/null || true # Ray's processes end with it
        echo "stopped"
    else
        echo "not running"
    fi
    clear_state
}

status() {
    local pid
    pid=$(holder) || {
        echo "not running"
        return 1
    }
    echo "process $pid: $(cat "$STATE/ready" 2>/dev/null || echo starting)"
}

cores() {
    getconf _NPROCESSORS_ONLN
}

case ${1:-} in
up)
    nodes=${2:-2}
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "up: $nodes is not a number of nodes; give 1 to 99"
    cpus=${LOCAL_CPUS:-$(($(cores) / nodes))}
    up "$nodes" "$((cpus > 0 ? cpus : 1))"
    ;;
down) down ;;
status) status ;;
*)
    echo "usage: clusters/local.sh up [NODES] | down | status" >&2
    exit 2
    ;;
esac
