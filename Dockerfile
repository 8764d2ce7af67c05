# docker build -t unclip .                                       CPU
# docker build -t unclip --build-arg TORCH_INDEX=cu126 .         CUDA
# docker run --rm -v "$PWD/out:/out" unclip text "a red apple" --out /out
FROM python:3.11-slim
ARG TORCH_INDEX=cpu
WORKDIR /app
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" \
    --index-url https://download.pytorch.org/whl/${TORCH_INDEX}
COPY pyproject.toml README.md LICENSE ./
COPY unclip unclip
COPY weights weights
COPY configs configs
RUN pip install --no-cache-dir .
ENTRYPOINT ["unclip"]
