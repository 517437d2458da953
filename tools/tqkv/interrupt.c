/* SPDX-License-Identifier: Apache-2.0 */
#include "interrupt.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

static void handle(int signal_number)
{
    static const char text[] = "\ntqkv: interrupted, nothing was written\n";
    (void)signal_number;
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
        _exit(TOOL_INTERRUPTED); /* nobody to tell */
    _exit(TOOL_INTERRUPTED);
}

static void both_signals(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGTERM);
}

void interrupt_install(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = handle;
    both_signals(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

/*
 * Other threads could still take the signal, so the disposition changes, not this thread's mask.
 * An ignored SIGINT is lost, which costs the user a second Ctrl-C after a write of milliseconds.
 */
void interrupt_hold(void)
{
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
}

void interrupt_release(void)
{
    interrupt_install();
}
