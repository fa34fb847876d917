#!/usr/bin/env bash
# Question: what would an ARM board compute? Makes a folder in which real aarch64 ONNX Runtime runs under emulation.
#
#   benchmarks/arm_sysroot.sh DIR [ONNXRUNTIME_VERSION [PACKAGE ...]]
#   benchmarks/arm_sysroot.sh DIR 1.31.1 openvino ncnn MNN ai-edge-litert    # for arm_runtimes.py
#   DIR/python cortex-a76 script.py              # that CPU's features, and its /proc/cpuinfo
#   DIR/python-count cortex-a76 script.py        # the same, counting instructions (arm_instructions.c)
#
# Needs Debian or Ubuntu (apt, dpkg-deb), qemu-user, python3 with pip, gcc. No root, no chroot, no binfmt: the emulator is
# started by name and looks every path up in the folder first. About 65 MB of downloads and 235 MB of disk;
# the four packages: 67 MB and 205 MB more. They are unpacked without what they depend on, of which inference needs none.
set -euo pipefail

dir=$(mkdir -p "$1" && cd "$1" && pwd)
version=${2:-1.31.1}
here=$(cd "$(dirname "$0")" && pwd)
command -v qemu-aarch64 >/dev/null || { echo "arm_sysroot: no qemu-aarch64; apt install qemu-user" >&2; exit 3; }

# Debian's own arm64 Python, unpacked and not installed; apt works in folders of its own, so dpkg here is not touched.
apt=$dir/apt
mkdir -p "$apt"/{lists/partial,archives/partial,sources}
: > "$apt/status"
cp /etc/apt/sources.list.d/*.sources "$apt/sources/" 2>/dev/null || cp /etc/apt/sources.list "$apt/sources/"
cat > "$apt/apt.conf" <<CONF
APT::Architecture "arm64"; APT::Architectures { "arm64"; }; APT::Install-Recommends "false"; APT::Sandbox::User "root";
Dir::State::Lists "$apt/lists"; Dir::State::status "$apt/status"; Dir::Cache::archives "$apt/archives";
Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache ""; Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "$apt/sources";
Acquire::Languages "none"; APT::Update::Post-Invoke-Success "";
CONF
export APT_CONFIG=$apt/apt.conf
apt-get update -qq
python=$(apt-cache depends python3-minimal | sed -n 's/.*Depends: \(python3\.[0-9]*\)-minimal$/\1/p' | head -1)
apt-get install -y -qq --download-only "$python-minimal" "lib$python-stdlib" libstdc++6 libgomp1 >/dev/null
unset APT_CONFIG
root=$dir/root
mkdir -p "$root/opt/site"
for package in "$apt"/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
[ -e "$root/lib" ] || ln -s usr/lib "$root/lib" # packages since Debian 13 rely on a link that the base system has
rm -rf "$apt" "$root/usr/share/doc"

# The aarch64 wheels.
platforms=(--platform manylinux2014_aarch64)
for glibc in 2_17 2_26 2_27 2_28 2_31 2_34 2_35; do platforms+=(--platform "manylinux_${glibc}_aarch64"); done
download=(python3 -m pip download -q --disable-pip-version-check --dest "$dir/wheels" --only-binary=:all:
  "${platforms[@]}" --python-version "${python#python}" --implementation cp --abi "cp${python#python3.}"
  --abi "cp3${python#python3.}" --abi abi3 --abi none)
"${download[@]}" "onnxruntime==$version" numpy
for package in "${@:3}"; do "${download[@]}" --no-deps "$package"; done
for wheel in "$dir"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$root/opt/site"; done

# One view of the folder per CPU, with that CPU's /proc/cpuinfo: with the x86 host's, ONNX Runtime dies at import, and the
# part number picks kernels.
cpu() {
  mkdir -p "$dir/cpu/$1/proc"
  for entry in "$root"/*; do ln -sfn "$entry" "$dir/cpu/$1/$(basename "$entry")"; done
  for core in 0 1 2 3; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\n' "$core" "$3"
    printf 'CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 3\n\n' "$2"
  done > "$dir/cpu/$1/proc/cpuinfo"
}
armv82="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
cpu cortex-a72 0xd08 "fp asimd evtstrm crc32 cpuid" # Raspberry Pi 4
cpu cortex-a76 0xd0b "$armv82"                      # Raspberry Pi 5; like Jetson Orin's A78AE
if command -v gcc >/dev/null; then
  gcc -O2 -Wall -shared -fPIC -o "$dir/instructions.so" "$here/arm_instructions.c"
else
  echo "arm_sysroot: no gcc, so python-count will not run" >&2
fi
for kind in "" -count; do
  {
    echo '#!/bin/sh'
    echo 'cpu=$1; shift'
    echo "exec qemu-aarch64 -cpu \"\$cpu\" ${kind:+-plugin file=$dir/instructions.so} -L $dir/cpu/\$cpu \\"
    echo "  -E PYTHONHASHSEED=0 -E PYTHONHOME=$root/usr -E PYTHONPATH=$root/opt/site $root/usr/bin/$python \"\$@\""
  } > "$dir/python$kind"
  chmod +x "$dir/python$kind"
done
"$dir/python" cortex-a76 -c 'import platform, onnxruntime; print(platform.machine(), onnxruntime.__version__)'
