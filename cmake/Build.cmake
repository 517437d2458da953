# SPDX-License-Identifier: Apache-2.0
# Compiler flags and the few functions that every folder's CMakeLists.txt uses.

# RelWithDebInfo is the developers' build: optimised, and TQKV_ASSERT stays on.
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2 -g")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib)
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)

set(tqkv_warnings -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
if(TQKV_WERROR)
    list(APPEND tqkv_warnings -Werror)
endif()

# Every C target of ours goes through here. -ffp-contract=off and no fast-math: what decides stored
# bytes must give the same bits on every CPU.
function(tqkv_c_target target)
    set_target_properties(${target} PROPERTIES
        C_STANDARD 11 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF C_VISIBILITY_PRESET hidden)
    target_compile_options(${target} PRIVATE ${tqkv_warnings} -ffp-contract=off)
    target_compile_definitions(${target} PRIVATE _POSIX_C_SOURCE=200809L _DEFAULT_SOURCE)
    if(TQKV_SANITIZE)
        target_compile_options(${target} PRIVATE
            -fsanitize=${TQKV_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
        target_link_options(${target} PRIVATE -fsanitize=${TQKV_SANITIZE})
    endif()
    if(TQKV_FUZZ)
        target_compile_options(${target} PRIVATE -fsanitize=fuzzer-no-link)
    endif()
endfunction()

# Adds every C file below the calling folder to the library. Globbed only while the modules are
# being written in parallel; explicit lists replace it.
function(tqkv_module_sources)
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.c)
    target_sources(turboquant_objects PRIVATE ${sources})
endfunction()

# An executable with the library inside, hidden symbols included.
function(tqkv_test_executable target)
    add_executable(${target} ${ARGN})
    tqkv_c_target(${target})
    target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests/support)
    target_compile_definitions(${target} PRIVATE
        TQKV_SOURCE_DIR="${PROJECT_SOURCE_DIR}" TQKV_VERSION_STRING="${PROJECT_VERSION}")
    target_link_libraries(${target} PRIVATE turboquant_static)
endfunction()
