/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The frame of a page: one file of HTML that is also XML, with its style inside, that loads nothing
 * and runs nothing. Colours are CSS variables, so one drawing serves light and dark.
 */
#ifndef TQKV_PAGE_H
#define TQKV_PAGE_H

#include <stdio.h>

/* A text from outside: escaped, and without characters that XML forbids. */
void page_text(FILE *out, const char *text);

void page_begin(FILE *out, const char *title);
void page_end(FILE *out);

/* A figure and the line that says what is to be seen; its drawing or table comes between. */
void page_figure_begin(FILE *out, const char *title, const char *caption);
void page_figure_end(FILE *out);

/* Classes that colour series in turn: "s0", "s1", ... */
enum { PAGE_SERIES = 8 };

#endif /* TQKV_PAGE_H */
