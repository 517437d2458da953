/* SPDX-License-Identifier: Apache-2.0 */
#include "page.h"

#include <string.h>

/* Colours by role: surfaces, ink, K and V, the plan, series. */
static const char *const light[] = {
    "--page: #f6f5f2; --card: #ffffff; --ink: #1d1c1a; --soft: #63615b; --line: #e2e0d9;",
    "--none: #d9d7d0; --k: #2a78d6; --v: #dd5f2a; --plan: #0b8a63;",
    "--s0: #2a78d6; --s1: #dd5f2a; --s2: #0b8a63; --s3: #b57b00;",
    "--s4: #c9447f; --s5: #5b46b8; --s6: #4d7d1c; --s7: #b33a3a;",
};
static const char *const dark[] = {
    "--page: #141413; --card: #1e1e1c; --ink: #f1efe9; --soft: #a9a69d; --line: #383733;",
    "--none: #45443f; --k: #5a9df0; --v: #f08a5b; --plan: #35c293;",
    "--s0: #5a9df0; --s1: #f08a5b; --s2: #35c293; --s3: #e0ac3a;",
    "--s4: #ee80ae; --s5: #a798f5; --s6: #98c65c; --s7: #ec7a7a;",
};
#define N_COLOR_LINES (sizeof(light) / sizeof(light[0]))

static const char *const rules[] = {
    "* { box-sizing: border-box; }",
    "body { margin: 0; background: var(--page); color: var(--ink);",
    "  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif; }",
    "main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 48px; }",
    "h1 { font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }",
    "h2 { font-size: 21px; margin: 44px 0 4px; } h3 { font-size: 16px; margin: 24px 0 0; }",
    "p { margin: 6px 0; } .soft, figcaption { color: var(--soft); }",
    ".facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 12px; padding: 0; }",
    ".facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;",
    "  padding: 12px 18px; min-width: 140px; }",
    ".facts b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; }",
    ".facts span { color: var(--soft); font-size: 13px; }",
    "figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;",
    "  margin: 16px 0; padding: 16px 18px; overflow-x: auto; }",
    "figure h3 { margin: 0; } figcaption { margin: 0 0 10px; font-size: 14px; }",
    "svg { display: block; width: 100%; min-width: 680px; height: auto; }",
    "svg text { font-size: 11.5px; fill: var(--soft); }",
    "svg text.strong { fill: var(--ink); font-weight: 600; }",
    ".grid { stroke: var(--line); stroke-width: 1; fill: none; }",
    ".path { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round; }",
    ".path.thin { stroke-width: 1; opacity: .32; } .path.thick { stroke-width: 3; }",
    ".path.dashed { stroke-dasharray: 5 4; }",
    ".bar { fill: var(--c); } .dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }",
    ".none { fill: var(--none); } .k { --c: var(--k); } .v { --c: var(--v); }",
    ".plan { --c: var(--plan); } .plain { --c: var(--soft); }",
    ".s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }",
    ".s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }",
    ".s6 { --c: var(--s6); } .s7 { --c: var(--s7); }",
    ".legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 8px 0; }",
    ".legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;",
    "  background: var(--c); margin-right: 6px; vertical-align: -1px; }",
    "table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }",
    "th { color: var(--soft); font-weight: 500; font-size: 13px; }",
    "th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }",
    "th:first-child, td:first-child { text-align: left; }",
    "tr:last-child td { border-bottom: 0; }",
    "code { font-family: ui-monospace, Menlo, Consolas, monospace; }",
    "footer { color: var(--soft); font-size: 13px; margin-top: 36px; }",
};
#define N_RULES (sizeof(rules) / sizeof(rules[0]))

static void print_colors(FILE *out, const char *const lines[N_COLOR_LINES])
{
    fputs(":root {", out);
    for (size_t i = 0; i < N_COLOR_LINES; i++)
        fprintf(out, " %s", lines[i]);
    fputs(" }\n", out);
}

static void print_style(FILE *out)
{
    fputs("<style>\n:root { color-scheme: light dark; }\n", out);
    print_colors(out, light);
    fputs("@media (prefers-color-scheme: dark) {\n", out);
    print_colors(out, dark);
    fputs("}\n", out);
    for (size_t i = 0; i < N_RULES; i++)
        fprintf(out, "%s\n", rules[i]);
    fputs("</style>\n", out);
}

/* U+FFFE and U+FFFF, the only ones above the control characters that valid UTF-8 may still hold. */
static int is_noncharacter(const char *text)
{
    return strncmp(text, "\xef\xbf\xbe", 3) == 0 || strncmp(text, "\xef\xbf\xbf", 3) == 0;
}

void page_text(FILE *out, const char *text)
{
    for (const char *c = text; *c; c++) {
        if (*c == '&')
            fputs("&amp;", out);
        else if (*c == '<')
            fputs("&lt;", out);
        else if (*c == '>')
            fputs("&gt;", out);
        else if (*c == '"')
            fputs("&quot;", out);
        else if ((unsigned char)*c < ' ')
            fputc(' ', out);
        else if (is_noncharacter(c))
            c += 2;
        else
            fputc(*c, out);
    }
}

void page_begin(FILE *out, const char *title)
{
    fputs("<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n"
          "<meta charset=\"utf-8\"/>\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>",
          out);
    page_text(out, title);
    fputs("</title>\n", out);
    print_style(out);
    fputs("</head>\n<body>\n<main>\n", out);
}

void page_end(FILE *out)
{
    fputs("</main>\n</body>\n</html>\n", out);
}

void page_figure_begin(FILE *out, const char *title, const char *caption)
{
    fprintf(out, "<figure>\n<h3>%s</h3>\n<figcaption>%s</figcaption>\n", title, caption);
}

void page_figure_end(FILE *out)
{
    fputs("</figure>\n", out);
}
