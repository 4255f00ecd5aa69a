# einkorn for NVIDIA GPUs; CUDA comes with jax, the driver with the host. From the root of a clone: docker build -f launch/docker/gpu.Dockerfile -t IMAGE .
# Tokens are never built in: give HF_TOKEN and WANDB_API_KEY to the container, as launch/README.md says.
FROM python:3.12-slim
WORKDIR /einkorn
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY input_pipeline input_pipeline
COPY launch launch
COPY models models
COPY trainers trainers
RUN pip install --no-cache-dir --editable '.[cuda,gcs]'
ENTRYPOINT ["bash", "launch/worker.sh"]
