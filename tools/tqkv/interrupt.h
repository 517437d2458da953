/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SIGINT and SIGTERM end the program at once with a message and status 130. Files are written
 * beside their place and renamed, so none is left half; while one is written, signals wait.
 */
#ifndef TQKV_INTERRUPT_H
#define TQKV_INTERRUPT_H

void interrupt_install(void);
void interrupt_hold(void);
void interrupt_release(void);

#endif /* TQKV_INTERRUPT_H */
