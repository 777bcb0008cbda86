# docker build -t speedrun . && docker run --rm --gpus all --ipc host -v "$PWD":/speedrun speedrun
# The host needs Docker, NVIDIA's driver and the NVIDIA Container Toolkit; without GPUs, leave out --gpus all.
# Logs, checkpoints, data and what was compiled stay in the folder that -v names, a clone of the project.
# PyTorch's wheels bring CUDA's libraries and Triton its assembler; compiling for the CPU needs a C++ compiler.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /speedrun
WORKDIR /speedrun
COPY requirements.txt .
COPY records/requirements.txt records/
RUN pip install --no-cache-dir --requirement requirements.txt --requirement records/requirements.txt
ENV TORCHINDUCTOR_CACHE_DIR=/speedrun/.cache/inductor TRITON_CACHE_DIR=/speedrun/.cache/triton \
    TIKTOKEN_CACHE_DIR=/speedrun/.cache/tiktoken HF_HOME=/speedrun/.cache/huggingface
COPY . .
ENTRYPOINT ["./run.sh"]
