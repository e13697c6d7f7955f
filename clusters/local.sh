#!/usr/bin/env bash
# Several Ray nodes on this machine, to try every cluster command before there is a cluster.
# They listen on 127.0.0.1 only, and ask for a token.
#
#   up      clusters/local.sh up 3        (nodes; 2 if not given)         CPUS=1 clusters/local.sh up 3      (cores of each)
#           export RAY_AUTH_MODE=token
#   submit  istanas submit --address http://127.0.0.1:8265 -- search --config tune_configs/digits_quickstart.yaml \
#               --workers 3 --set runtime.runs_dir=$PWD/runs
#   watch   istanas jobs --address http://127.0.0.1:8265                   and the pages at http://127.0.0.1:8265
#   fetch   nothing to fetch: the runs lie in runs/, see `istanas results`
#   down    clusters/local.sh down                                          also: clusters/local.sh status
#
# Without the job server: istanas search --workers 3 --address 127.0.0.1:6379 (or auto, or ray://127.0.0.1:10001)
#
# The token is that of RAY_AUTH_TOKEN, else in the file $RAY_AUTH_TOKEN_PATH, else in ~/.ray/auth_token (made if absent, mode 600).
# Ports: PORT, DASHBOARD_PORT, CLIENT_PORT. What runs is remembered in $STATE. A machine with several GPUs needs none of
# this: istanas search --workers N uses them all.
set -euo pipefail

STATE=${STATE:-/tmp/istanas-local-$(id -u)} # short: Unix sockets lie in it
PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
CLIENT_PORT=${CLIENT_PORT:-10001}
SECONDS_TO_START=180
SECONDS_TO_STOP=30

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

state, (nodes, cpus, port, dashboard, client) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:])
own = {"node_ip_address": "127.0.0.1", "num_cpus": cpus, "temp_dir": str(state / "ray")}
head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
head |= {"gcs_server_port": port, "ray_client_server_port": client}
cluster = Cluster(initialize_head=True, head_node_args={**own, **head, "node_name": "node1"})
try:
    for number in range(2, nodes + 1):
        cluster.add_node(**own, node_name=f"node{number}")
    cluster.wait_for_nodes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
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
    local pid
    pid=$(cat "$STATE/pid" 2>/dev/null) || return 1
    ps -o command= -p "$pid" 2>/dev/null | grep -qF -- " $STATE " || return 1
    echo "$pid"
}

make_token() {
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then return; fi
    local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [ ! -s "$file" ]; then
        mkdir -p "$(dirname "$file")"
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
    for port in "$PORT" "$DASHBOARD_PORT" "$CLIENT_PORT"; do
        free "$port" || fail "port $port of 127.0.0.1 is taken: set PORT (6379), DASHBOARD_PORT (8265) or CLIENT_PORT (10001)"
    done
    make_token
    rm -rf "$STATE" # of one that was killed
    mkdir -m 700 "$STATE" || fail "STATE is $STATE, which can't be made anew: name another folder"
    cd "$STATE"
    env RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_USAGE_STATS_ENABLED=0 \
        MLFLOW_DISABLE_TELEMETRY=true PATH="$(dirname "$PYTHON"):$PATH" \
        "$PYTHON" -c "$HOLDER" "$STATE" "$nodes" "$cpus" "$PORT" "$DASHBOARD_PORT" "$CLIENT_PORT" \
        >"$STATE/log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$STATE/pid"
    for ((i = 0; i < 5 * SECONDS_TO_START; i++)); do
        if [ -s "$STATE/ready" ]; then
            cat "$STATE/ready"
            echo "next: export RAY_AUTH_MODE=token; istanas submit --address http://127.0.0.1:$DASHBOARD_PORT -- search --workers $nodes --set runtime.runs_dir=\$PWD/runs"
            return
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 5 "$STATE/log" >&2
    down >/dev/null
    fail "the cluster did not start: see the lines above"
}

down() {
    local pid
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
    rm -rf "$STATE"
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
    cpus=${CPUS:-$(($(cores) / nodes))}
    up "$nodes" "$((cpus > 0 ? cpus : 1))"
    ;;
down) down ;;
status) status ;;
*)
    echo "usage: clusters/local.sh up [NODES] | down | status" >&2
    exit 2
    ;;
esac
