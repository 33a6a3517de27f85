# moeapps on a CPU, with the locked versions and no network needed afterwards:
#   docker build --tag moeapps .
#   docker run --rm moeapps                                   # make demo
#   docker run --rm moeapps make test
#   docker run --rm --volume "$PWD/runs:/home/moe/runs" moeapps lightning fit --config configs/mixer.yaml
FROM python:3.11.13-slim-bookworm

# A compiler for the one package that has no wheel (pesq); git for the commit in run.json.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 moe
USER moe
WORKDIR /home/moe/moeapps

# The environment before the code: a change of code does not install it again.
COPY --chown=moe:moe requirements.lock ./
RUN python -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir --require-hashes --requirement requirements.lock

COPY --chown=moe:moe . .
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && touch .venv/.installed \
    && mkdir -p /home/moe/runs

# Runs lie where a volume can be mounted, and one thread is fastest for small networks.
ENV PATH=/home/moe/moeapps/.venv/bin:$PATH \
    MOEAPPS_RUNS=/home/moe/runs \
    OMP_NUM_THREADS=1 \
    MKL_NUM_THREADS=1

CMD ["make", "demo"]
