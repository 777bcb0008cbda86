# docker build -t speedrun . && docker run --rm --gpus all --ipc host speedrun
# PyTorch's wheels bring CUDA's libraries and Triton its assembler; compiling for the CPU needs a C++ compiler.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /speedrun
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
ENTRYPOINT ["./run.sh"]
