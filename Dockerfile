# An environment with everything that tests need: docker build -t oscar . && docker run --rm oscar
#   --build-arg TORCH=cu132     torch for a GPU (any backend that uv pip install --torch-backend knows)
#   --build-arg PYTHON=3.11     another version of Python that constraints/ has
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# A compiler for what has no wheel for this Python or processor; Chromium for the tests of pages.
RUN apt-get update \
    && apt-get install -y --no-install-recommends chromium g++ git libgl1 libglib2.0-0 make \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv

WORKDIR /oscar
ARG PYTHON
ARG TORCH=cpu
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY configs configs
COPY oscar oscar
# CUDA's libraries are those of the chosen torch, and not those that the constraints have for the default one.
RUN grep -vE '^(nvidia|cuda)-' "constraints/${PYTHON}.txt" > /tmp/constraints.txt \
    && uv venv .venv \
    && uv pip install --no-cache --torch-backend "${TORCH}" -c /tmp/constraints.txt -e '.[all,docs,dev]'
COPY . .
RUN touch .venv/.installed
ENV PATH=/oscar/.venv/bin:$PATH
CMD ["make", "test"]
