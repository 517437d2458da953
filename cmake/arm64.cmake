# SPDX-License-Identifier: Apache-2.0
# Toolchain of the preset `arm64`: Debian's cross compiler, and qemu to run what it makes. The
# variable QEMU_CPU says which CPU the tests see (CMakePresets.json).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

# Root folder with libcmocka for arm64; `scripts/fetch.py cmocka-arm64` prints it.
if(TQKV_ARM64_ROOT)
    set(ENV{PKG_CONFIG_SYSROOT_DIR} ${TQKV_ARM64_ROOT})
    set(ENV{PKG_CONFIG_LIBDIR} ${TQKV_ARM64_ROOT}/usr/lib/aarch64-linux-gnu/pkgconfig)
endif()
