# docker build -t unclip .                                        torch as pip gives it, with CUDA
# docker build -t unclip --build-arg PIP_OPTIONS="…" .            a CPU build: the options that
#                                                                 PyTorch's own page names for it
# docker run --rm -v "$PWD/out:/out" unclip text "a red apple" --out /out
FROM python:3.11-slim
ARG PIP_OPTIONS=""
WORKDIR /app
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" ${PIP_OPTIONS}
COPY pyproject.toml README.md LICENSE ./
COPY unclip unclip
COPY configs configs
COPY data data
COPY weights weights
RUN pip install --no-cache-dir .
ENTRYPOINT ["unclip"]
