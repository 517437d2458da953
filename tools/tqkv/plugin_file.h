/* SPDX-License-Identifier: Apache-2.0 */
/* Where libggml-turboquant.so lies. */
#ifndef TQKV_PLUGIN_FILE_H
#define TQKV_PLUGIN_FILE_H

/*
 * The plugin named by `given`, else by $TQKV_PLUGIN, else the one beside the program or in the
 * lib folder next to it. Absolute path, given. NULL: not there; says what was tried where `tell`.
 */
char *plugin_file_find(const char *given, int tell);

#endif /* TQKV_PLUGIN_FILE_H */
