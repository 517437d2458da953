# SPDX-License-Identifier: Apache-2.0
# What `cmake --install` puts where: libraries, headers, pkg-config and CMake package files, tqkv.
include(CMakePackageConfigHelpers)

set(tqkv_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)

install(TARGETS turboquant_shared turboquant_static EXPORT turboquant-targets
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/turboquant DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN *.h)
install(EXPORT turboquant-targets NAMESPACE turboquant:: DESTINATION ${tqkv_cmake_dir})
configure_package_config_file(cmake/turboquant-config.cmake.in turboquant-config.cmake
    INSTALL_DESTINATION ${tqkv_cmake_dir})
write_basic_package_version_file(turboquant-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/turboquant-config.cmake ${PROJECT_BINARY_DIR}/turboquant-config-version.cmake
    DESTINATION ${tqkv_cmake_dir})

file(RELATIVE_PATH tqkv_pc_up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /) # the installed tree may be moved
configure_file(cmake/turboquant.pc.in turboquant.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/turboquant.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

foreach(target tqkv ggml-turboquant)
    if(TARGET ${target})
        install(TARGETS ${target}
            RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
            LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
endforeach()
