#!/usr/bin/env bash
# Several machines without a scheduler; the same command on each of them:
#
#     NNODES=2 RDZV_ENDPOINT=node1:29500 recipes/torchrun/multi_node.sh configs/llama3_1_70b_dint.yaml output_dir=/shared/run
#
# NNODES                    how many machines
# RDZV_ENDPOINT             host:port where they meet: one of the machines, and a port that is open on it
# RDZV_ID=run               another name for each job that uses the endpoint
# LOCAL_ADDR=               how the others reach this machine, where its host name does not resolve there
# DRY_RUN=1                 print the command, start nothing
# PYTHON=/path/to/python    of the environment with lrdint_tune; default: python
# NPROC_PER_NODE=gpu        processes on each machine, or gpu for one on each GPU
# MAX_RESTARTS=3            how often killed processes may be replaced
set -euo pipefail

config=${1:?usage: NNODES=N RDZV_ENDPOINT=HOST:PORT multi_node.sh CONFIG [key=value ...]}
shift
nodes=${NNODES:?set it to the number of machines}
endpoint=${RDZV_ENDPOINT:?set it to HOST:PORT, the same on every machine}

command=(
    "${PYTHON:-python}" -m lrdint_tune.launch
    --nnodes "$nodes" --nproc_per_node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}"
    --rdzv_id "${RDZV_ID:-run}" --rdzv_endpoint "$endpoint" ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"}
    -m lrdint_tune.full_finetune_distributed --config "$config" resume=auto "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
