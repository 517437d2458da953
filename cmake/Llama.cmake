# SPDX-License-Identifier: Apache-2.0
# Turns TQKV_LLAMA, a finished llama.cpp build folder, into the target tqkv_llama. Only tools and
# tests use it; neither the library nor the plugin needs anything from llama.cpp to build.

if(NOT EXISTS ${TQKV_LLAMA}/CMakeCache.txt)
    message(FATAL_ERROR "TQKV_LLAMA=${TQKV_LLAMA} is no build folder of llama.cpp")
endif()
load_cache(${TQKV_LLAMA} READ_WITH_PREFIX tqkv_llama_ CMAKE_HOME_DIRECTORY)
set(TQKV_LLAMA_SOURCE ${tqkv_llama_CMAKE_HOME_DIRECTORY})
set(TQKV_LLAMA_BIN ${TQKV_LLAMA}/bin)

add_library(tqkv_llama INTERFACE)
target_include_directories(tqkv_llama SYSTEM INTERFACE ${TQKV_LLAMA_SOURCE}/include ${TQKV_LLAMA_SOURCE}/ggml/include)
foreach(name llama ggml ggml-base)
    find_library(tqkv_lib_${name} ${name} PATHS ${TQKV_LLAMA_BIN} NO_DEFAULT_PATH REQUIRED)
    mark_as_advanced(tqkv_lib_${name})
    target_link_libraries(tqkv_llama INTERFACE ${tqkv_lib_${name}})
endforeach()
target_link_options(tqkv_llama INTERFACE LINKER:-rpath-link,${TQKV_LLAMA_BIN})
