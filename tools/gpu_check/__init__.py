"""Runs on a GPU what was only ever tried on a CPU, and prints one JSON object.

tools/gpu_check/pack.sh .wheels                      # where there is a network
tools/gpu_check/run.sh .wheels --out FOLDER          # on the machine with the GPU
python -m tools.gpu_check --toy --out FOLDER         # all parts at toy sizes on a CPU
"""
