# run_mnist.sh name opts...
N=$1; shift; cd /tmp/r; export OMP_NUM_THREADS=1
/work/main/.venv/bin/accelerate launch --quiet --num_processes 1 --num_cpu_threads_per_process 1 /work/main/pipeline/train.py --config /work/main/configs/mnist.yaml --data.path=/tmp/d/mnist_val --run.path=/tmp/r/runs/$N --match.latents=codes --train.threads=1 "$@" > /tmp/r/$N.log 2>&1
/work/main/.venv/bin/naign evaluate /tmp/r/runs/$N > /tmp/r/$N.eval.log 2>&1
tail -1 /tmp/r/runs/$N/metrics.jsonl | tr ',' '\n' | grep -E 'cpu|seconds/training|loss' > /tmp/r/$N.cost
