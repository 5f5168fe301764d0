# A server and a command line on a CPU, with the model that comes along:
#   docker build -t usmlite .
#   docker run --rm -p 8000:8000 usmlite
#   docker run --rm -v "$PWD:/speech:ro" usmlite transcribe /speech/interview.wav
ARG PYTHON=python:3.13-slim-bookworm

FROM ${PYTHON} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
# PyTorch's own index has a build without CUDA, which pip takes for the newer one.
RUN python -m venv /usmlite \
 && /usmlite/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
      --constraint /source/constraints.txt --config-settings=cmake.define.USMLITE_REQUIRE_NATIVE=ON \
      "/source[serve,vad]"

FROM ${PYTHON}
COPY --from=build /usmlite /usmlite
ENV PATH=/usmlite/bin:$PATH HF_HOME=/tmp/huggingface PYTHONUNBUFFERED=1
RUN useradd --create-home listener
USER listener
WORKDIR /home/listener
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# `docker stop` sends SIGTERM: what was accepted is answered first.
STOPSIGNAL SIGTERM
ENTRYPOINT ["usmlite"]
CMD ["serve", "--host", "0.0.0.0"]
