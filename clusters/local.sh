#!/usr/bin/env bash
# Several Ray nodes on this machine, to try every cluster command before there is a cluster.
# They listen on 127.0.0.1 only, and ask for a token.
#
#   up      clusters/local.sh up 3        (nodes; 2 if not given)         LOCAL_CPUS=1 clusters/local.sh up 3      (cores of each)
#           export RAY_AUTH_MODE=token
#   submit  istanas submit --address http://127.0.0.1:8265 -- search --config tune_configs/digits_quickstart.yaml --workers 3 \
#               --set runtime.runs_dir=$PWD/runs --set tracking.uri=sqlite:///$PWD/mlflow.db
#   watch   istanas jobs --address http://127.0.0.1:8265                   (`istanas stop ID` ends one)
#   fetch   nothing to fetch: the runs lie in runs/, see `istanas results` and `istanas ui`
#   down    clusters/local.sh down                                          also: clusters/local.sh status
#
# Without the job server: istanas search --workers 3 --address 127.0.0.1:6379   (or auto)
#
# The token is that of RAY_AUTH_TOKEN, else in the file $RAY_AUTH_TOKEN_PATH, else in ~/.ray/auth_token (made if absent, mode 600).
# Other ports: LOCAL_PORT, LOCAL_DASHBOARD_PORT. What runs is remembered in the folder LOCAL_STATE. The nodes
# have no GPUs: a machine with several of them needs no cluster, `istanas search --workers N` uses them all.
set -euo pipefail

STATE=${LOCAL_STATE:-/tmp/istanas-local-$(id -u)} # short: Unix sockets lie in it
MARK=.istanas-local
PORT=${LOCAL_PORT:-6379}
DASHBOARD_PORT=${LOCAL_DASHBOARD_PORT:-8265}
SECONDS_TO_START=180
SECONDS_TO_STOP=30
VARIABLES= # what a user has to set beside RAY_AUTH_MODE

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$here/.venv/bin/python" || command -v python3)
fi

# `ray start` has no several nodes on 127.0.0.1 only, Ray's own Cluster has. Its processes end with this one, however it ends.
read -r -d '' HOLDER <<'PYTHON' || true
import os, pathlib, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it, and jobs would be
if os.getpgrp() != os.getpid():
    os.setsid()  # Ctrl-C in the terminal is for others
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

state, (nodes, cpus, port, dashboard) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:])
own = {"node_ip_address": "127.0.0.1", "num_cpus": cpus}
own |= {"dashboard_agent_listen_port": None}  # any, so that two clusters do not want the same; without its agent a node takes no jobs
head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
head |= {"gcs_server_port": port, "node_name": "node1", "temp_dir": str(state / "1")}
cluster = Cluster(initialize_head=True, head_node_args={**own, **head})
try:
    for number in range(2, nodes + 1):
        # A folder each: in a common one, a node would replace the working folder of a job that runs on another.
        cluster.add_node(**own, node_name=f"node{number}", temp_dir=str(state / str(number)))
    cluster.wait_for_nodes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (state / "1" / "ray_current_cluster").write_text(cluster.address)  # else a job may join another cluster of this machine
    while True:  # the job server answers last
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

# The process that holds the cluster, if it lives and is ours: a number in a file alone may be somebody else's by now.
holder() {
    local pid command
    pid=$(cat "$STATE/pid" 2>/dev/null) || return 1
    command=$(ps -ww -o command= -p "$pid" 2>/dev/null) || return 1
    [[ $command == *" $STATE "* ]] || return 1 # not by grep -q: it ends first, and ps would be said to have failed
    echo "$pid"
}

clear_state() { # what is not ours stays
    if [ -e "$STATE/$MARK" ] && [ -O "$STATE" ]; then rm -rf "$STATE"; fi
}

make_token() {
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then return; fi
    local file=${RAY_AUTH_TOKEN_PATH:-${HOME:-}/.ray/auth_token}
    if [ ! -s "$file" ]; then
        if ! mkdir -p "$(dirname "$file")" 2>/dev/null || ! [ -w "$(dirname "$file")" ]; then
            fail "token: $file can't be written: set RAY_AUTH_TOKEN_PATH to a file that can, and export it for istanas, too"
        fi
        (umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
    fi
    if [ -O "$file" ]; then chmod 600 "$file"; fi # Ray itself leaves it readable for everybody
}

free() { # whether nobody listens on a port of 127.0.0.1
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

up() {
    local nodes=$1 cpus=$2 pid port
    if pid=$(holder); then
        echo "runs already, process $pid: $(cat "$STATE/ready" 2>/dev/null || echo starting)"
        return
    fi
    "$PYTHON" -c 'import ray.cluster_utils' 2>/dev/null || fail "PYTHON is $PYTHON, which has no Ray: make .venv, or name another"
    for port in "$PORT" "$DASHBOARD_PORT"; do
        free "$port" || fail "port $port of 127.0.0.1 is taken: set LOCAL_PORT or LOCAL_DASHBOARD_PORT"
    done
    make_token
    clear_state # of one that was killed
    mkdir -m 700 "$STATE" 2>/dev/null || fail "LOCAL_STATE is $STATE, which is there already: name a folder that is not"
    cd "$STATE"
    touch "$MARK"
    make_folder_of_ray
    if ! start "$nodes" "$cpus"; then
        # On a busy machine a node may miss Ray's own limit of 30 seconds.
        if ! grep -q "timed out during startup" log || ! start "$nodes" "$cpus"; then
            tail -n 5 log >&2
            down >/dev/null
            fail "the cluster did not start: see the lines above"
        fi
    fi
    cat ready
    echo "next: export RAY_AUTH_MODE=token$VARIABLES, and the commands at the top of clusters/local.sh"
}

# Ray writes the cluster's address for `--address auto` into its default folder, which it does not create for a head that has
# another one. On a machine with several users, the folder or the file in it may belong to somebody else.
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
        echo "ended"
    else
        echo "nothing runs"
    fi
    clear_state
}

status() {
    local pid
    pid=$(holder) || {
        echo "nothing runs"
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
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "up $nodes: give a number of nodes from 1 to 99"
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
