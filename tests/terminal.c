/* A conversation on a pseudo-terminal: keys in, screen out.  A small model of a terminal keeps
 * what ./run sends as cells, so that the tests say what a person sees and where the cursor is.
 *
 *   cc tests/terminal.c && ./a.out [./run]
 *
 * From the repository's root.  Nothing waits for a time to pass, but until the screen shows what
 * is expected, or for as long as the patience lasts.  Sequences that the model does not know
 * fail. */
#define _XOPEN_SOURCE 700
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { MOST_ROWS = 50, MOST_COLUMNS = 120, CELL = 28 };

static double patience = 200; /* seconds: a busy machine may stop a program for many */
static const char *program = "./run";
static const char *volume = "-q"; /* or another option, where more is to be said */
static const char MODEL[] = "tests/demo/story-q8.bin";
static char folder[] = "/tmp/gemma2-terminal-XXXXXX", history[64], file[64], script[64];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the terminal ---- */

typedef struct {
    char text[CELL]; /* a character and what joins it; empty: blank, or a wide one's right half */
    int width;       /* 0: blank or a right half */
} cell;

static struct {
    int master, width, height, row, column;
    int full;                 /* the cursor is on the last column's character, as if behind it */
    cell cells[MOST_ROWS][MOST_COLUMNS];
    int goes_on[MOST_ROWS];   /* a row that was full: the next belongs to its line */
    char bytes[16];           /* of a sequence or a character so far */
    size_t n;
    int marks_pastes, bells, ended;
    pid_t child;
} t;

/* The few characters that these tests use. */
static int columns(uint32_t code)
{
    if ((code >= 0x300 && code <= 0x36F) || code == 0x200D || code == 0xFE0F)
        return 0;
    return 1 + (code >= 0x1F300 || (code >= 0x1100 && code <= 0x115F) ||
                (code >= 0x3041 && code <= 0xD7A3));
}

static void clear_cells(int row, int column)
{
    for (; row < MOST_ROWS; row++, column = 0) {
        memset(t.cells[row] + column, 0, (size_t)(MOST_COLUMNS - column) * sizeof(cell));
        t.goes_on[row] = 0;
    }
}

static void next_row(void)
{
    if (++t.row < t.height)
        return;
    t.row--;
    memmove(t.cells, t.cells + 1, sizeof t.cells - sizeof t.cells[0]);
    memmove(t.goes_on, t.goes_on + 1, sizeof t.goes_on - sizeof t.goes_on[0]);
    clear_cells(t.height - 1, 0);
}

static void put_char(const char *bytes, size_t n, uint32_t code)
{
    int width = columns(code), at = t.full ? t.column : t.column - 1;
    if (width == 0) { /* the cell was zeroed, so its text stays one */
        while (at > 0 && !t.cells[t.row][at].width)
            at--;
        if (at >= 0 && strlen(t.cells[t.row][at].text) + n < CELL)
            memcpy(t.cells[t.row][at].text + strlen(t.cells[t.row][at].text), bytes, n);
        return;
    }
    if (t.full || t.column + width > t.width) {
        t.goes_on[t.row] = 1;
        next_row();
        t.column = t.full = 0;
    }
    memset(t.cells[t.row] + t.column, 0, (size_t)width * sizeof(cell));
    memcpy(t.cells[t.row][t.column].text, bytes, n);
    t.cells[t.row][t.column].width = width;
    t.column += width;
    if (t.column >= t.width)
        t.full = 1, t.column = t.width - 1;
}

/* ESC [ and what follows; 0 where it goes on. */
static int put_sequence(void)
{
    char last = t.bytes[t.n - 1];
    int n = t.n > 2 ? atoi(t.bytes + 2) : 0, count = n ? n : 1;
    if (t.n < 3 || last < '@')
        return 0;
    t.bytes[t.n] = '\0';
    if (last == 'A')
        t.row = t.row > count ? t.row - count : 0;
    else if (last == 'C')
        t.column = t.column + count < t.width ? t.column + count : t.width - 1;
    else if (last == 'J' && n == 0)
        clear_cells(t.row, t.column);
    else if (last == 'J' && n == 2)
        clear_cells(0, 0);
    else if (last == 'H' && t.n == 3)
        t.row = t.column = 0;
    else if (strncmp(t.bytes + 2, "?2004", 5) == 0)
        t.marks_pastes = last == 'h';
    else
        check(0, "a sequence that is not known: ESC %s", t.bytes + 1);
    t.full = 0;
    return 1;
}

static void put_byte(char byte)
{
    unsigned char first;
    t.bytes[t.n++] = byte;
    first = (unsigned char)t.bytes[0];
    if (first == 27 && (t.n < 2 || (t.n < sizeof t.bytes - 1 && !put_sequence())))
        return;
    if (first >= 0xC0 && t.n < (first >= 0xF0 ? 4u : first >= 0xE0 ? 3u : 2u))
        return;
    if (first >= 0xC0) {
        uint32_t code = first & (0x7Fu >> t.n);
        for (size_t i = 1; i < t.n; i++)
            code = code << 6 | ((unsigned char)t.bytes[i] & 0x3Fu);
        put_char(t.bytes, t.n, code);
    } else if (first == '\r')
        t.column = t.full = 0;
    else if (first == '\n')
        t.full = 0, next_row();
    else if (first == '\a')
        t.bells++;
    else if (first == '\b')
        t.column -= t.column > 0;
    else if (first >= ' ' && first < 0x7F)
        put_char(t.bytes, 1, first);
    else if (first != 27)
        check(0, "a byte that is not known: %02X", first);
    t.n = 0;
}

/* The rows as text, without blanks at the end of a row and empty rows at the end. */
static const char *screen(void)
{
    static char text[MOST_ROWS * MOST_COLUMNS * CELL];
    size_t n = 0, kept = 0;
    for (int row = 0; row < t.height; row++) {
        for (int column = 0; column < t.width; column++) {
            const cell *c = &t.cells[row][column];
            n += (size_t)sprintf(text + n, "%s", c->width ? c->text : "");
            if (!c->width && !(column && c[-1].width == 2))
                text[n++] = ' ';
            if (c->width && c->text[0] != ' ')
                kept = n;
        }
        n = kept > n ? n : n;
        while (n > 0 && text[n - 1] == ' ')
            n--;
        text[n++] = '\n';
    }
    while (n > 0 && text[n - 1] == '\n')
        n--;
    text[n] = '\0';
    return text;
}

/* Takes what the program sends, waiting a little. */
static void pump(void)
{
    char bytes[4096];
    struct pollfd in = {t.master, POLLIN, 0};
    if (t.ended || poll(&in, 1, 10) <= 0)
        return;
    ssize_t got = read(t.master, bytes, sizeof bytes);
    if (got <= 0 && errno != EINTR)
        t.ended = 1;
    for (ssize_t i = 0; i < got; i++)
        put_byte(bytes[i]);
}

/* Takes what comes; 0 where nothing more is to wait for.  A program that keeps a check waiting is
 * given half the time from then on. */
static int waits(double end)
{
    pump();
    if (now() >= end)
        patience /= 2;
    return !t.ended && now() < end;
}

/* Folds the lines anew, as most terminals do, and keeps the cursor where it was in its line. */
static void resize(int width, int height)
{
    static cell old[MOST_ROWS][MOST_COLUMNS];
    int went_on[MOST_ROWS], was_width = t.width, was_row = t.row, was_column = t.column + t.full;
    int row = -1, column = 0;
    memcpy(old, t.cells, sizeof old);
    memcpy(went_on, t.goes_on, sizeof went_on);
    t.width = width, t.height = height;
    t.row = t.column = t.full = 0;
    clear_cells(0, 0);
    for (int r = 0; r <= was_row && was_width; r++) {
        int last = was_width;
        while (last > 0 && !old[r][last - 1].width && !(last > 1 && old[r][last - 2].width == 2))
            last--;
        for (int c = 0; c < (r == was_row && last < was_column ? was_column : last); c++) {
            if (r == was_row && c == was_column)
                row = t.row, column = t.column + t.full;
            if (old[r][c].width)
                put_char(old[r][c].text, strlen(old[r][c].text),
                         old[r][c].width == 2 ? 0x4E00 : 'x');
            else if (!c || old[r][c - 1].width != 2)
                put_char(" ", 1, ' ');
        }
        if (r < was_row && !went_on[r])
            t.column = t.full = 0, next_row();
    }
    if (row >= 0)
        t.row = row, t.column = column, t.full = 0;
    struct winsize size = {.ws_row = (unsigned short)height, .ws_col = (unsigned short)width};
    ioctl(t.master, TIOCSWINSZ, &size);
}

static void type_bytes(const char *keys, size_t n)
{
    double end = now() + patience;
    while (n && waits(end)) {
        ssize_t written = write(t.master, keys, n < 512 ? n : 512);
        keys += written > 0 ? written : 0;
        n -= written > 0 ? (size_t)written : 0;
    }
}

static void type(const char *keys) { type_bytes(keys, strlen(keys)); }

/* Waits until the screen is as said and the cursor there. */
static int shows(const char *name, const char *want, int row, int column)
{
    double end = now() + patience;
    int more, ok;
    do {
        more = waits(end);
        ok = strcmp(screen(), want) == 0 && t.row == row && t.column == column;
    } while (!ok && more);
    return check(ok, "%s: the screen is\n%s\nwith the cursor at %d, %d, not\n%s\nat %d, %d", name,
                 screen(), t.row, t.column, want, row, column);
}

/* Waits until the text stands on the screen. */
static int has(const char *name, const char *want)
{
    double end = now() + patience;
    while (!strstr(screen(), want) && waits(end))
        continue;
    return check(strstr(screen(), want) != NULL, "%s: the screen has no '%s':\n%s", name, want,
                 screen());
}

/* Waits until the conversation asks on the row below a text's last one. */
static int asks_behind(const char *name, const char *text)
{
    char want[620];
    snprintf(want, sizeof want, "%s\n>", text);
    double end = now() + patience;
    int more, ok;
    do {
        more = waits(end);
        const char *all = screen();
        size_t n = strlen(all), m = strlen(want);
        ok = n >= m && strcmp(all + n - m, want) == 0 && t.column == 2;
    } while (!ok && more);
    return check(ok, "%.60s: there is no '%s' and a prompt at the end of\n%s", name, text,
                 screen());
}

/* ---- the program ---- */

/* Starts it on a new terminal; options end with NULL.  0 where there is no terminal. */
static int start(int width, int height, const char *const *options)
{
    memset(&t, 0, sizeof t);
    const char *name = NULL;
    t.master = posix_openpt(O_RDWR | O_NOCTTY);
    if (t.master < 0 || grantpt(t.master) < 0 || unlockpt(t.master) < 0 ||
        (name = ptsname(t.master)) == NULL)
        return 0;
    const char *arguments[40] = {program, MODEL, "-c", volume, "-t", "0", "-j", "1", "-C", "20000"};
    for (int i = 10; *options; i++)
        arguments[i] = *options++;
    resize(width, height);
    fflush(stdout);
    t.child = fork();
    if (t.child == 0) {
        setsid();
        int slave = open(name, O_RDWR);
        ioctl(slave, TIOCSCTTY, 0);
        for (int fd = 0; fd < 3; fd++)
            dup2(slave, fd);
        close(slave), close(t.master);
        execv(program, (char *const *)(uintptr_t)arguments);
        _exit(99);
    }
    return t.child > 0;
}

/* Its exit status, 128 + a signal, or 1000 + the signal that stopped it. */
static int status_of(int may_stop)
{
    int status = 0;
    double end = now() + patience;
    pid_t got = 0;
    while (now() < end &&
           (got = waitpid(t.child, &status, WNOHANG | (may_stop ? WUNTRACED : 0))) == 0)
        waits(end);
    if (got == 0) {
        kill(t.child, SIGKILL);
        waitpid(t.child, &status, 0);
        return -1;
    }
    return WIFSTOPPED(status) ? 1000 + WSTOPSIG(status)
                              : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int is_cooked(void)
{
    struct termios now_set;
    return tcgetattr(t.master, &now_set) == 0 && now_set.c_lflag & ICANON && now_set.c_lflag & ECHO;
}

/* Waits for the end.  The terminal must be as it was. */
static void ends(const char *name, int want)
{
    int status = status_of(0);
    double end = now() + patience;
    while (t.marks_pastes && waits(end))
        continue; /* what was sent last */
    check(status == want, "%s: exit status %d, not %d; the screen is\n%s", name, status, want,
          screen());
    check(is_cooked() && !t.marks_pastes, "%s: the terminal is not as it was", name);
    close(t.master);
}

/* The last message in the history's file. */
static const char *last_message(void)
{
    static char text[200000]; /* a NUL before it all */
    FILE *in = fopen(history, "rb");
    size_t last = in ? fread(text + 1, 1, sizeof text - 1, in) : 0;
    if (in)
        fclose(in);
    while (last > 1 && text[last - 1])
        last--;
    return text + last;
}

/* ---- the editor ---- */

#define TWENTY "abcdefghijklmnopqrst"
#define WIDE "\xE4\xB8\xAD"      /* U+4E2D */
#define ACUTE "e\xCC\x81"        /* e, U+0301 */
#define FLAG "\xF0\x9F\x87\xA9\xF0\x9F\x87\xAA" /* two letters */
#define THUMB "\xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD" /* with a tone of skin */
#define FAMILY "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7" /* two that U+200D joins */

/* On an empty screen: what keys show, where the cursor is, and the message that Enter sends as
 * the history has it. */
typedef struct {
    const char *name, *keys, *screen;
    int row, column;
    const char *message; /* NULL: Enter does not end it */
} typing;

static const typing KEYS[] = { /* on 20 columns and 6 rows */
    {"a paste", "\033[200~one\ntwo\r\nthree\rfour\033[201~!", "> one\n. two\n. three\n. four!", 3,
     7, "one\ntwo\nthree\nfour!"},
    {"typing", "abc", "> abc", 0, 5, "abc"},
    {"left", "abc\033[D\033ODX", "> aXbc", 0, 4, "aXbc"},
    {"right", "abc\001\033[C\033OCX", "> abXc", 0, 5, "abXc"},
    {"Ctrl-B and Ctrl-F", "abc\002\002\002\006X", "> aXbc", 0, 4, "aXbc"},
    {"Home", "d\033[Hc\033[1~b\033[7~a\033OHX", "> Xabcd", 0, 3, "Xabcd"},
    {"Ctrl-A", "abc\001X", "> Xabc", 0, 3, "Xabc"},
    {"End", "a\001\033[Fb\001\033[4~c\001\033[8~d\001\033OFe", "> abcde", 0, 7, "abcde"},
    {"Ctrl-E", "abc\001\005X", "> abcX", 0, 6, "abcX"},
    {"Delete", "abc\001\033[3~", "> bc", 0, 2, "bc"},
    {"Ctrl-D amid the text", "abc\001\004", "> bc", 0, 2, "bc"},
    {"backspace", "abc\177", "> ab", 0, 4, "ab"},
    {"backspace in the middle", "abc\002\010", "> ac", 0, 3, "ac"},
    {"Ctrl-K", "abc def\001\006\006\006\013", "> abc", 0, 5, "abc"},
    {"Ctrl-U", "abc def\002\002\002\025", "> def", 0, 2, "def"},
    {"Ctrl-W", "abc def \027", "> abc", 0, 6, "abc "},
    {"answers of a terminal", "a\033]11;rgb:0/0/0\007b\033P1$r0m\033\\c", "> abc", 0, 5,
     "abc"},
    {"Ctrl-S", "a\023b", "> ab", 0, 4, "ab"},
    {"words", "abc def\033[1;5DX\033b\033bY\033fZ", "> YabcZ Xdef", 0, 7, "YabcZ Xdef"},
    {"keys that are not known", "a\033[15~\033[1;2Pb\033Oq\033[[Ac\033xd", "> abcd", 0, 6,
     "abcd"},
    {"a tab", "a\tb", "> a b", 0, 5, "a\tb"},
    {"bytes that are no UTF-8", "a\xC3(\xFFz", "> a?(?z", 0, 7, "a\xC3(\xFFz"},
    {"wide", "a" WIDE "b", "> a" WIDE "b", 0, 6, "a" WIDE "b"},
    {"left of wide", "a" WIDE "b\033[D\033[D", "> a" WIDE "b", 0, 3, "a" WIDE "b"},
    {"wide taken back", "a" WIDE "b\033[D\177", "> ab", 0, 3, "ab"},
    {"combining", "x" ACUTE "y", "> x" ACUTE "y", 0, 5, "x" ACUTE "y"},
    {"left of combining", "x" ACUTE "y\033[D\033[D", "> x" ACUTE "y", 0, 3, "x" ACUTE "y"},
    {"combining taken back", "x" ACUTE "\177", "> x", 0, 3, "x"},
    {"joined", FAMILY "x\002\177", "> x", 0, 2, "x"},
    {"flags", FLAG FLAG "x" FLAG "\002\002\002\177", "> " FLAG "x" FLAG, 0, 2, FLAG "x" FLAG},
    {"a tone of skin", THUMB "\002x", "> x" THUMB, 0, 3, "x" THUMB},
    {"a full row", "abcdefghijklmnopqr", "> abcdefghijklmnopqr", 1, 0, "abcdefghijklmnopqr"},
    {"one more", TWENTY, "> abcdefghijklmnopqr\nst", 1, 2, TWENTY},
    {"two full rows", TWENTY "abcdefghijklmnopqr", "> abcdefghijklmnopqr\nstabcdefghijklmnopqr",
     2, 0, TWENTY "abcdefghijklmnopqr"},
    {"a longer row", TWENTY "\001X", "> Xabcdefghijklmnopq\nrst", 0, 3, "X" TWENTY},
    {"a shorter row", TWENTY "\001\033[3~", "> bcdefghijklmnopqrs\nt", 0, 2,
     "bcdefghijklmnopqrst"},
    {"back to a full row", "abcdefghijklmnopqrs\177", "> abcdefghijklmnopqr", 1, 0,
     "abcdefghijklmnopqr"},
    {"across rows", TWENTY "\033[D\033[D\033[D", "> abcdefghijklmnopqr\nst", 0, 19, TWENTY},
    {"up a row", TWENTY "\033[AX", "> Xabcdefghijklmnopq\nrst", 0, 3, "X" TWENTY},
    {"wide at the edge", "abcdefghijklmnopq" WIDE "r", "> abcdefghijklmnopq\n" WIDE "r", 1, 3,
     "abcdefghijklmnopq" WIDE "r"},
    {"wide fills the row", "abcdefghijklmnop" WIDE, "> abcdefghijklmnop" WIDE, 1, 0,
     "abcdefghijklmnop" WIDE},
    {"combining at the edge", "abcdefghijklmnopq" ACUTE "x", "> abcdefghijklmnopq" ACUTE "\nx", 1,
     1, "abcdefghijklmnopq" ACUTE "x"},
    {"Alt-Enter", "one\033\rtwo", "> one\n. two", 1, 5, "one\ntwo"},
    {"Alt-Enter of others", "one\033[13;2utwo\033[27;2;13~x", "> one\n. two\n. x", 2, 3,
     "one\ntwo\nx"},
    {"up to a shorter line", "a\033\rbcd\033[A!", "> a!\n. bcd", 0, 4, "a!\nbcd"},
    {"down to a line", "abc\033\rd\033[A\033[H\033[B!", "> abc\n. !d", 1, 3, "abc\n!d"},
    {"Ctrl-A in a second line", "abc\033\rd\001!", "> abc\n. !d", 1, 3, "abc\n!d"},
    {"Ctrl-K joins lines", "ab\033\rcd\033[A\005\013", "> abcd", 0, 4, "abcd"},
    {"backspace joins lines", "ab\033\rcd\001\177", "> abcd", 0, 4, "abcd"},
    {"a newline in a full row", "abcdefghijklmnopqr\033\rs", "> abcdefghijklmnopqr\n\n. s", 2, 3,
     "abcdefghijklmnopqr\ns"},
    {"down below a full row", "abcdefghijklmnopqr\033\rs\033[A\033[B!",
     "> abcdefghijklmnopqr\n\n. s!", 2, 4, "abcdefghijklmnopqr\ns!"},
    {"up and down over an empty line", "abcd\033\r\033\refg\002\033[A\033[A!\033[B\033[B?",
     "> ab!cd\n.\n. efg?", 2, 6, "ab!cd\n\nefg?"},
    {"up to where a line begins", "a\033\r" TWENTY "\002\002\033[A!",
     "> a\n. !abcdefghijklmnopq\nrst", 1, 3, "a\n!" TWENTY},
    {"keys in a paste", "\033[200~a\001\177\033[Ab\033[201~", "> a???[Ab", 0, 9,
     "a\001\177\033[Ab"},
    {"ESC ends a paste", "\033[200~a\033\033[201~b", "> a?b", 0, 5, "a\033b"},
    {"a cut sequence ends a paste", "\033[200~a\033[12\033[201~b", "> a?[12b", 0, 8,
     "a\033[12b"},
    {"ESC before a key", "ab\033\033[D!", "> a!b", 0, 4, "a!b"},
    {"a paste in the middle", "ab\002\033[200~x\ny\033[201~!", "> ax\n. y!b", 1, 4, "ax\ny!b"},
    {"a backslash", "one\\\rtwo", "> one\n. two", 1, 5, "one\ntwo"},
    {"quotes", "\"\"\"one\rtwo", "> \"\"\"one\n. two", 1, 5, NULL},
};
static const typing NARROW[] = { /* on 10 columns and 3 rows */
    {"a screen of 10", "abcdefghijkl", "> abcdefgh\nijkl", 1, 4, "abcdefghijkl"},
    {"more rows than there are", "one\033\rtwo\033\rthree\033\rfour", ". two\n. three\n. four", 2,
     6, "one\ntwo\nthree\nfour"},
    {"up in them", "one\033\rtwo\033\rthree\033\rfour\033[A\033[A\033[A\001!",
     "> !one\n. two\n. three", 0, 3, "!one\ntwo\nthree\nfour"},
    {"up and down in them",
     "one\033\rtwo\033\rthree\033\rfour\033[A\033[A\033[A\033[B\033[B\033[B\005!",
     ". two\n. three\n. four!", 2, 7, "one\ntwo\nthree\nfour!"},
};

static void test_typing(const typing *k)
{
    type("\014");
    if (!shows(k->name, ">", 0, 2))
        return;
    type(k->keys);
    shows(k->name, k->screen, k->row, k->column);
    type(k->message ? "\r" : "\"\"\"\r");
    asks_behind(k->name, "ok");
    check(!k->message || strcmp(last_message(), k->message) == 0,
          "%s: the message is '%s', not '%s'", k->name, last_message(), k->message);
}

static void test_keys(void)
{
    const char *const options[] = {"--choice", "ok", "--history", history, NULL};
    if (!check(start(20, 6, options), "no start"))
        return;
    shows("start", ">", 0, 2);
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS && !t.ended; i++)
        test_typing(&KEYS[i]);
    resize(10, 3);
    for (size_t i = 0; i < sizeof NARROW / sizeof *NARROW && !t.ended; i++)
        test_typing(&NARROW[i]);
    resize(2, 5), type("\014ab"), has("2 columns", "ab"), type("\r"), has("2 columns", "ok");
    resize(20, 6), asks_behind("from 2 columns to 20", "ok");
    type("\014"), shows("Ctrl-L", ">", 0, 2), type("\004"), ends("Ctrl-D", 0);
    check(t.row == 1, "Ctrl-D leaves on row %d", t.row);
}

/* Starts a conversation whose every reply is "ok", with up to four more options. */
static int talk(int width, int height, const char *a, const char *b, const char *c, const char *d)
{
    const char *const options[] = {"--choice", "ok", a, b, c, d, NULL};
    return check(start(width, height, options), "no start") && shows("start", ">", 0, 2);
}

/* On an empty screen: types a line and waits for what the conversation says last. */
static void enter(const char *line, const char *last)
{
    type("\033[200~\033[201~\014"); /* a terminal that marks pastes need not wait for one */
    if (!shows(line, ">", 0, 2))
        return;
    type(line), type("\r"), asks_behind(line, last);
}

static void test_history(void)
{
    unlink(history);
    if (!talk(20, 9, "--history", history, NULL, NULL))
        return;
    struct stat st;
    check(stat(history, &st) == 0 && (st.st_mode & 0777) == 0600, "the history's mode");
    enter("one", "ok");
    enter("two\033\rlines", "ok");
    type("new\014"), shows("a draft", "> new", 0, 5);
    type("\033[A"), shows("up", "> two\n. lines", 1, 7);
    type("\033[A"), shows("up in it", "> two\n. lines", 0, 5);
    type("\020"), shows("up to the first", "> one", 0, 5);
    type("\033[A"), shows("there is none before", "> one", 0, 5);
    type("!\033[B"), shows("down", "> two\n. lines", 1, 7);
    type("\016"), shows("down to the draft", "> new", 0, 5);
    type("!\033[A\033[A\033OA"), shows("a changed one", "> one!", 0, 6);
    type("\033[B\033[B\033[B"), shows("the changed draft", "> new!", 0, 6);
    type("\033[A\033[A\033[A\014\r"), asks_behind("one again", "ok");
    type("\033[A\033[A\033[A\033[A"), shows("as it was sent", "> one!\nok\n> one", 2, 5);
    type("\025\004"), ends("Ctrl-D", 0);
    if (!talk(20, 9, "--history", history, NULL, NULL))
        return;
    type("\033[A\033[A"), shows("from the file", "> two\n. lines", 1, 7);
    type("\005\025\025\177\025\004"), ends("after the history", 0);
    check(strcmp(last_message(), "one!") == 0, "the history ends in %s", last_message());
    FILE *out = fopen(history, "wb"); /* more messages than are kept, the last torn */
    fprintf(out, "#gemma2%c%17000000d%c", 0, 7, 0);
    for (int i = 0; i < 1100; i++)
        fprintf(out, "m%d%c", i, 0);
    fprintf(out, "to");
    fclose(out);
    if (!talk(20, 9, "--history", history, NULL, NULL))
        return;
    type("\033[A"), shows("a torn message", "> to", 0, 4);
    type("\033[A"), shows("the one before", "> m1099", 0, 7);
    type("\025\004"), ends("a long history", 0);
    int messages = 0;
    char oldest[8] = "";
    FILE *in = fopen(history, "rb");
    check(in && fseek(in, 8, SEEK_SET) == 0 && fread(oldest, 1, 5, in) == 5, "no history");
    for (int c = 0; in && (c = fgetc(in)) != EOF;)
        messages += c == 0;
    check(messages == 999 && !strcmp(oldest, "m101"), "%d messages behind %s", messages, oldest);
    if (in)
        fclose(in);
    const char *const elsewhere[] = {"--history", MODEL, NULL};
    if (check(start(99, 9, elsewhere), "no start"))
        has("elsewhere", "is not a history of messages: it seems to be a model"),
            ends("elsewhere", 1);
}

static void test_sizes(void)
{
    static char longest[4501];
    if (!talk(20, 6, "--history", history, NULL, NULL))
        return;
    type(TWENTY "0123456789"), shows("before", "> abcdefghijklmnopqr\nst0123456789", 1, 12);
    resize(40, 6), shows("wider", "> " TWENTY "0123456789", 0, 32);
    type("!"), shows("and more", "> " TWENTY "0123456789!", 0, 33);
    resize(10, 6), shows("narrower", "> abcdefgh\nijklmnopqr\nst01234567\n89!", 3, 3);
    type("\033[A\033[A"), shows("up", "> abcdefgh\nijklmnopqr\nst01234567\n89!", 1, 3);
    resize(20, 6), shows("in the middle", "> abcdefghijklmnopqr\nst0123456789!", 0, 13);
    type("\005"), shows("its end", "> abcdefghijklmnopqr\nst0123456789!", 1, 13);
    resize(20, 1), shows("one row", "st0123456789!", 0, 13);
    type("\177"), shows("and less", "st0123456789", 0, 12);
    resize(20, 6), type("\014"), shows("rows again", "> abcdefghijklmnopqr\nst0123456789", 1, 12);
    type("\r"), asks_behind("resized", "ok");
    for (size_t i = 0; i < sizeof longest - 1; i++)
        longest[i] = "once "[i % 5];
    enter(longest, "ok");
    check(strcmp(last_message(), longest) == 0, "%zu of 4,500 bytes", strlen(last_message()));
    type("\004"), ends("Ctrl-D", 0);
}

static void test_signals(void)
{
    if (!talk(40, 9, NULL, NULL, NULL, NULL))
        return;
    type("a message"), shows("a message", "> a message", 0, 11);
    memcpy(t.cells[3], (cell[]){{"!", 1}}, sizeof(cell)); /* what is drawn anew is cleared */
    for (double end = now() + 0.5; now() < end;)
        pump();
    shows("nothing is typed", "> a message\n\n\n!", 0, 11);
    t.cells[3][0].width = 0;
    type("\003");
    shows("Ctrl-C", "> a message\nCtrl-C once more leaves, and so does /ex\nit.\n>", 3, 2);
    type("\033[A"), shows("it is kept", "> a message\nCtrl-C once more leaves, and so does /ex\n"
                                        "it.\n> a message", 3, 11);
    type("\014\025"), shows("alone", ">", 0, 2), type("a message\003"); /* at once */
    shows("again", "> a message\nCtrl-C once more leaves, and so does /ex\nit.\n>", 3, 2);
    type("\003"), ends("Ctrl-C twice", 130);

    if (!talk(20, 8, NULL, NULL, NULL, NULL))
        return;
    enter("hello", "ok");
    type(TWENTY "0123\001"), shows("rows", "> hello\nok\n> abcdefghijklmnopqr\nst0123", 2, 2);
    check(!is_cooked() && t.marks_pastes, "keys are not read one at a time");
    for (int i = 0; i < 2; i++) {
        type(i ? "\005" : "\001"), shows("the cursor", screen(), i ? 5 : 2, i ? 6 : 2);
        type("\032");
        check(status_of(1) == 1000 + SIGSTOP, "Ctrl-Z does not stop it");
        double end = now() + patience;
        while (t.marks_pastes && waits(end))
            continue;
        check(is_cooked(), "Ctrl-Z leaves the terminal in raw mode");
        for (const char *c = "\r\n$ fg\r\n"; *c; c++) /* a shell's */
            put_byte(*c);
        kill(t.child, SIGCONT);
        shows("fg", i ? "ok\n>\n$ fg\n> abcdefghijklmnopqr\nst0123\n$ fg\n"
                        "> abcdefghijklmnopqr\nst0123"
                      : "> hello\nok\n>\n$ fg\n> abcdefghijklmnopqr\nst0123",
              i ? 7 : 4, i ? 6 : 2);
        check(!is_cooked() && t.marks_pastes, "keys are not read one at a time after fg");
    }
    type("!\r"), asks_behind("after fg", "ok");
    type("\004"), ends("Ctrl-D", 0);

    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGABRT, SIGSEGV, SIGBUS,
                                  SIGFPE, SIGILL};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (!talk(40, 9, NULL, NULL, NULL, NULL))
            return;
        type("abc"), shows("abc", "> abc", 0, 5);
        kill(t.child, numbers[i]);
        if (numbers[i] == SIGINT) /* as often as it takes */
            has("SIGINT", "once more"), kill(t.child, SIGINT);
        char name[40];
        snprintf(name, sizeof name, "signal %d", numbers[i]);
        ends(name, 128 + numbers[i]);
    }
}

/* A conversation amid a reply that does not end by itself. */
static int starts_reply(const char *option, const char *value)
{
    const char *const endless[] = {"--ignore-eos", option, value, NULL};
    if (!check(start(40, 9, endless), "no start"))
        return 0;
    shows("start", ">", 0, 2), type("hello\r");
    double end = now() + patience;
    while (t.row < 4 && waits(end))
        continue;
    return 1;
}

/* While a reply is made. */
static void test_stopping(void)
{
    for (int i = 0; i < 2; i++) {
        if (!starts_reply(NULL, NULL))
            return;
        if (i == 0)
            kill(t.child, SIGTERM), ends("SIGTERM amid a reply", 143);
        else {
            type("next"), type("\003"), has("typed amid a reply", "\n> next"), type("\025");
            asks_behind("Ctrl-C amid a reply", "");
            enter("/exit now", "run: /exit takes nothing");
            type("\004"), ends("Ctrl-D", 0);
            if (!starts_reply(NULL, NULL))
                return;
            type("/stats\r/undo\r\003"), asks_behind("lines typed amid a reply", "forgo\ntten.");
            type("\003"), has("Ctrl-C", "Ctrl-C once more"), type("\003"), ends("Ctrl-C", 130);
        }
    }
}

/* A terminal that edits its lines itself. */
static void test_lines(void)
{
    static char line[5001];
    static const struct {
        const char *keys, *message;
    } lines[] = {{"one\r", "one"}, {"two\rthree\r\rfour\r", "two\nthree\n\nfour"},
                 {"\"\"\"a\rb\"\"\"\r", "a\nb"}, {"a\\\rb\r", "a\nb"}, {"//x\r", "//x"},
                 {"\"\"\"/exit\r\"\"\"\r", "/exit\n"}, {line, "/exit\n"}, {"ab\177c\r", "ac"}};
    memset(line, 'x', sizeof line - 2);
    line[sizeof line - 2] = '\r';
    setenv("TERM", "dumb", 1);
    if (!talk(90, 9, "--history", history, NULL, NULL))
        return;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        for (int row = 0; row < t.height; row++)
            put_byte('\n'); /* an empty screen */
        type(lines[i].keys);
        asks_behind(lines[i].message, lines[i].keys == line ? "that end in \\." : "ok");
        check(strcmp(last_message(), lines[i].message) == 0, "the message is %s, not %s",
              last_message(), lines[i].message);
    }
    check(is_cooked() && !t.marks_pastes, "the terminal is changed");
    type("\004"), ends("lines", 0);
    setenv("TERM", "xterm", 1);
}

/* The terminal vanishes: the session is kept, whether SIGHUP ends the program or it reads the
 * end. */
static void test_vanishing(void)
{
    for (int ignored = 0; ignored < 2; ignored++) {
        struct stat st;
        signal(SIGHUP, ignored ? SIG_IGN : SIG_DFL);
        if (!talk(20, 6, "--session", file, NULL, NULL))
            return;
        enter("hello", "ok");
        type("more");
        close(t.master);
        t.ended = 1;
        int status = status_of(0);
        check(status == (ignored ? 0 : 129), "a terminal that is gone: exit status %d", status);
        check(stat(file, &st) == 0 && st.st_size > 1000, "the session is lost");
        unlink(file);
    }
    signal(SIGHUP, SIG_DFL);
}

/* A new conversation from the session's file has so many turns, and at least so many tokens. */
static void holds(const char *name, int want_turns, int want_tokens)
{
    static const char *const options[] = {"--load", file, NULL};
    int turns = -1, tokens = -1;
    if (!check(start(110, 20, options), "no start"))
        return;
    enter("/show", "repeat-last-n     64");
    const char *at = strstr(screen(), " turn");
    while (at && at > screen() && at[-1] != '\n')
        at--;
    if (at)
        sscanf(at, "%d turn%*[s,] %d of", &turns, &tokens);
    check(turns == want_turns && tokens >= want_tokens, "%s: the session is\n%s", name, screen());
    type("\004"), ends(name, 0);
}

/* However a conversation ends, its session holds it. */
static void test_leaving(void)
{
    if (!talk(40, 9, "--session", file, NULL, NULL))
        return;
    enter("hello", "ok");
    type("\003"), has("Ctrl-C", "once more"), type("\003"), ends("Ctrl-C", 130);
    holds("Ctrl-C", 1, 10);
    if (!talk(40, 9, "--session", file, NULL, NULL))
        return;
    enter("/clear", "> /clear"), type("\004"), ends("/clear", 0);
    holds("/clear", 0, 0);
    if (!starts_reply("--session", file))
        return;
    kill(t.child, SIGHUP), ends("SIGHUP amid a reply", 129);
    holds("SIGHUP amid a reply", 1, 20);
    unlink(file);
    char gone[80], kept[80], save[80]; /* whose folder goes */
    snprintf(gone, sizeof gone, "%s/gone", folder);
    snprintf(kept, sizeof kept, "%s/gone/file", folder);
    snprintf(save, sizeof save, "/save %s", file);
    check(mkdir(gone, 0700) == 0, "no folder");
    if (!talk(110, 9, "--session", kept, NULL, NULL))
        return;
    enter("hello", "ok");
    check(rmdir(gone) == 0, "the folder stays");
    for (int i = 0; i < 2; i++) { /* a message between them asks anew */
        enter("hello again", "ok");
        enter("/exit", "leaving once more loses what is not saved.");
    }
    enter(save, "go on from it."), type("\004"), ends("a session that cannot be saved", 1);
    holds("saved elsewhere", 3, 30);
    unlink(file);
}

/* What is said while a long prompt is read leaves nothing behind on a narrow terminal. */
static void test_progress(void)
{
    const char *const options[] = {"--choice", "ok", NULL};
    volume = "--exact";
    for (int i = 0; i < 2 && check(start(i ? 20 : 70, 30, options), "no start"); i++) {
        has("progress", "\n>");
        type("\033[200~\033[201~\014"), shows("progress", ">", 0, 2);
        for (int k = 0; k < 40; k++)
            type("1234567890");
        type("\r"), asks_behind("progress", "90\nok"), type("\004"), ends("progress", 0);
    }
    volume = "-q";
}

/* ---- commands ---- */

static void write_file(const char *path, const char *bytes, size_t n)
{
    FILE *out = fopen(path, "wb");
    check(out && fwrite(bytes, 1, n, out) == n, "%s cannot be written", path);
    if (out)
        fclose(out);
}

#define CHANGED "system            Speak in rhyme.\n" \
    "max-tokens        99\ntemperature       0.5\nseed              7\ntop-k             5\n" \
    "top-p             0.5\nmin-p             0\nrepeat-penalty    1\npresence-penalty  0\n" \
    "frequency-penalty 0\nrepeat-last-n     64"

/* What is typed and what the conversation then says last; "@" stands for the folder.  In order,
 * in a conversation of its own. */
static const char *const COMMANDS[][2] = {
    {"/show", "0 turns, 0 of 20000 tokens of context\nmax-tokens        -1\n"
     "temperature       0\nseed              0\ntop-k             64\ntop-p             0.95\n"
     "min-p             0\nrepeat-penalty    1\npresence-penalty  0\nfrequency-penalty 0\n"
     "repeat-last-n     64"},
    {"/help", "around\nthem; a pasted text is one message.  //x says /x.  Ctrl-C stops a reply."},
    {"/undo", "run: there is no turn to take back"},
    {"/regen", "run: there is no reply to make again"},
    {"/save @/file", "run: there is nothing to save yet"},
    {"one", "ok"},
    {"two", "ok"},
    {"/regen", "ok"},
    {"/undo", "The last message and its reply are forgotten."},
    {"/undo", "The last message and its reply are forgotten."},
    {"/undo", "run: there is no turn to take back"},
    {"/undoo", "run: unknown command /undoo; the nearest is /undo; /help lists all, and //undoo "
     "sends /undoo"},
    {"/", "run: unknown command /; /help lists all, and // sends /"},
    {"/foo", "run: unknown command /foo; /help lists all, and //foo sends /foo"},
    {"/xyzzy plugh", "run: unknown command /xyzzy; /help lists all, and //xyzzy sends /xyzzy"},
    {"/EXIT", "run: unknown command /EXIT; /help lists all, and //EXIT sends /EXIT"},
    {"/clear all", "run: /clear takes nothing"},
    {"/read", "run: /read needs FILE"},
    {"/load", "run: /load needs FILE"},
    {"/read @/none", "run: cannot open @/none: No such file or directory"},
    {"/read @", "run: @ is not a file that can hold text"},
    {"/read -", "run: - is not a file that can hold text"},
    {"/read tests/demo/story-q8.bin",
     "run: tests/demo/story-q8.bin seems to be a model of gemma2.c, not text"},
    {"/read @/script", "89 bytes of @/script go before the next message."},
    {"/clear", ""},
    {"one", "ok"},
    {"/system", "run: /system needs TEXT or -"},
    {"/system x", "The system text is changed."},
    {"/system -", "There is no system text now."},
    {"/system Speak in rhyme.", "The system text is changed."},
    {"/set", "run: /set needs NAME VALUE"},
    {"/set top-k", "run: /set top-k '': it takes a whole number from 0 to 2147483647"},
    {"/set context 5",
     "run: /set changes nothing but the options that /show lists, so not --context"},
    {"/set =5", "run: unknown option - (/show lists all)"},
    {"/set topk 5", "run: unknown option --topk; the nearest is --top-k (/show lists all)"},
    {"/set top-k five", "run: /set top-k 'five': it takes a whole number from 0 to 2147483647"},
    {"/set min-p 2", "run: /set min-p '2': it takes a number from 0 to 1"},
    {"/set --top-p 0.5", ""},
    {"/set top_k 5", ""},
    {"/set temp=0.5", ""},
    {"/set s 7", ""},
    {"/set seed 8x", "run: /set seed '8x': it takes a whole number from 0 to 18446744073709551615"},
    {"/set max-tokens 0", ""},
    {"/read @/script", "89 bytes of @/script go before the next message."},
    {"two", "run: -n 0 leaves no room for the shortest reply, which takes 1 tokens\n"
     "The message is taken back; the up arrow has it."},
    {"/regen", "run: -n 0 leaves no room for the shortest reply, which takes 1 tokens\n"
     "The old reply stays."},
    {"/set max-tokens 99", ""},
    {"/show", "1 turn, 24 of 20000 tokens of context\n"
     "90 bytes that /read has found go before the next message\n" CHANGED},
    {"/save @/script",
     "run: @/script is not a saved session: it seems to be text; give another name"},
    {"/save @/none/file", "run: cannot save the session as @/none/file: No such file or directory"},
    {"/save @/file", "Saved as @/file; /load, --load and --session go on from it."},
    {"/save @/file", "Saved as @/file; /load, --load and --session go on from it."},
    {"/load @/none", "run: cannot open @/none: No such file or directory"},
    {"/load @/script",
     "run: @/script is not a saved session: it seems to be text; give another name"},
    {"two", "ok"},
    {"/show", "2 turns, 98 of 20000 tokens of context\n" CHANGED}, /* with what /read found */
    {"/load @/file", "@/file: 1 turn, 24 of 20000 tokens of context"},
    {"/undo", "The last message and its reply are forgotten."},
    {"/edit", "> edited\nok"},
    {"/edit and fail", "run: the editor failed, so nothing is sent; set EDITOR to another"},
    {"/edit nothing", "The message is empty, so nothing is sent."},
    {"/stats", "Speed and tokens are shown after each reply."},
    {"/stats", "Speed is no longer shown."},
    {"//x", "ok"},
    {"/quit now", "run: /quit takes nothing"},
};

static void test_commands(void)
{
    static const char edits[] = "grep -q fail \"$1\" && exit 1\n"
        "stty raw\ngrep -q nothing \"$1\" && : >\"$1\" || echo edited >\"$1\"";
    static const char *const leave[] = {"/exit\r", "/quit\r", "/bye\r", "\004"};
    char editor[80];
    write_file(script, edits, sizeof edits - 1);
    snprintf(editor, sizeof editor, "sh %s", script);
    setenv("EDITOR", editor, 1);
    setenv("TMPDIR", folder, 1);
    if (!talk(110, 40, "--history", history, "-s", "0"))
        return;
    for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS && !t.ended; i++) {
        char text[2][600] = {"", ""}, shown[610];
        for (int k = 0; k < 2; k++)
            for (const char *c = COMMANDS[i][k]; *c; c++)
                snprintf(text[k] + strlen(text[k]), 100, *c == '@' ? "%s" : "%.1s",
                         *c == '@' ? folder : c);
        snprintf(shown, sizeof shown, *text[1] ? "%s" : "> %s", text[!!*text[1]]);
        enter(text[0], shown);
    }
    type("\014\020\020\020\020\020\020"), shows("what $EDITOR wrote", "> edited", 0, 8);
    type("\025");
    type("/exit\r"), ends("/exit", 0);
    for (int i = 0; i < 4; i++)
        if (talk(40, 9, NULL, NULL, NULL, NULL))
            type(leave[i]), ends(leave[i], 0);
}

/* ---- conversations that go on, and full ones ---- */

static int same_files(const char *a, const char *b)
{
    FILE *in[2] = {fopen(a, "rb"), fopen(b, "rb")};
    int c = 0, same = in[0] && in[1];
    while (same && c != EOF)
        same = (c = fgetc(in[0])) == fgetc(in[1]);
    for (int i = 0; i < 2; i++)
        if (in[i])
            fclose(in[i]);
    return same;
}

/* A conversation that was loaded gives what it would have given without a pause. */
static void test_loading(void)
{
    static const char system[] = "Speak in rhyme.\nAlways.";
    char save[2][80];
    snprintf(save[0], sizeof save[0], "/save %s", file);
    snprintf(save[1], sizeof save[1], "/save %s", script);
    for (int i = 0; i < 6; i++) {
        int again = i % 2, has_system = i > 1 && i < 5; /* the last loads it without the option */
        const char *const options[] = {
            "--choice", "ok", "--exact", has_system ? "-S" : "-q", has_system ? system : "-q",
            again ? "--load" : NULL, file, NULL};
        if (!check(start(110, 20, options), "no start"))
            return;
        if (!again) {
            unlink(file), unlink(script);
            enter("one", "ok"), enter("/read tests/requirements.txt", "the next message.");
            enter("two\033\r  lines", "ok"), enter("three", "ok");
            enter(save[0], "go on from it.");
        }
        enter("/show", "repeat-last-n     64");
        check(strstr(screen(), "3 turns,") != NULL, "the turns are not known:\n%s", screen());
        check(!strstr(screen(), "if there is one") == !(again && !has_system),
              "%d: the system text is\n%s", i, screen());
        enter("/undo", "forgotten."), enter("/undo", "forgotten.");
        enter("/regen", "ok"), enter("more", "ok");
        if (i < 4) {
            enter("/system Say less.", "is changed."), enter("/undo", "forgotten.");
            enter("end", "ok");
        }
        enter(save[again ? 0 : 1], "go on from it.");
        type("\004"), ends("loading", 0);
        check(!again || same_files(file, script), "%d: it went on in another way", i);
    }
    char odd[80];
    snprintf(odd, sizeof odd, "%s/\001", folder);
    if (rename(file, odd) == 0 && talk(110, 20, NULL, NULL, NULL, NULL)) {
        type("\033[200~/load "), type(odd), type("\033[201~\r"), has("an odd name", ": 2 turns, ");
        type("\004"), ends("an odd name", 0);
    }
    unlink(odd);
}

/* No conversation starts in which no message can be answered. */
static void test_too_small(void)
{
    static const char *const cases[][7] = {
        {"-C", "64", "-S", "12345678901234567890123456789012345678901234567890",
         "this system text has 65 tokens and the context holds 64"},
        {"-C", "9", "-q", "-q", "the shortest conversation has 14 tokens and the context holds 9"},
        {"-n", "1", "--choice", "The dog ran", "-n 1 leaves no room for the shortest reply, which "
         "takes 3 tokens"},
        {"-C", "15", "--choice", "The dog ran", "room for 2 more tokens and the shortest reply "
         "takes 3"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const options[] = {cases[i][0], cases[i][1], cases[i][2], cases[i][3], NULL};
        if (check(start(119, 9, options), "no start"))
            has("too small", cases[i][4]), ends("too small", 2);
    }
}

/* The oldest turns go: before a message, and amid a reply, which goes on. */
static void test_full(void)
{
    static const char *const small[] = {"--choice", "ok", "-C", "64", "-S", "Rhyme.", "--session",
                                        file, NULL};
    static const char *const stop[] = {"--choice", "ok", "-C", "64", "--full", "stop", NULL};
    static const char *const long_ones[] = {"-n", "30", "--ignore-eos", "-C", "64", NULL};
    static const char *const alone[] = {"--ignore-eos", "-C", "64", NULL};
    unlink(file);
    for (int i = 0; i < 2; i++) { /* its own turns, and loaded ones */
        if (!check(start(90, 20, small), "no start"))
            return;
        for (int k = i ? 3 : 1; k < 7; k++)
            enter("a message", k == 3 || k == 5 ? "ok\n6 of 64 tokens of context are left."
                  : k < 3 ? "ok" : "is full, so the oldest turns are dropped: 2 of 4.\nok");
        enter("1234567890123456789012345678901234567890123456789012345678901234567890",
              "has 124 tokens; the context holds 6\n4.\nSay less, or /clear to start over.");
        enter("/system 12345678901234567890123456789012345678901234567890123456789",
              "the cont\next holds 64, so the old one stays"); /* neither drops anything */
        enter("/show", "repeat-last-n     64");
        check(strstr(screen(), "2 turns, 40 of 64") && strstr(screen(), "system            Rhyme."),
              "%d: turns or the system text are lost:\n%s", i, screen());
        type("\004"), ends("dropping", 0);
    }
    if (!check(start(90, 20, stop), "no start"))
        return;
    for (int k = 0; k < 4; k++)
        enter("a message", k < 3 ? "ok" : "the conversation has 70 tokens; the context holds 64\n."
                                          "\nSay less, or /clear to start over.");
    type("\004"), ends("--full stop", 0);
    if (!check(start(90, 20, long_ones), "no start"))
        return;
    enter("/stats", "after each reply.");
    for (int k = 0; k < 2; k++) {
        type("\014"), shows("full", ">", 0, 2);
        type("a message\r"), has("full", "; reply 30 tokens,");
        check(!k == !strstr(screen(), "so the oldest turns are dropped: 1 of 2.\n"),
              "turn %d:\n%s", k, screen());
    }
    type("\014"), shows("full", ">", 0, 2), type("\004"), ends("amid a reply", 0);
    if (!check(start(90, 20, alone), "no start"))
        return;
    enter("a message", "The context of 64 tokens is full, so the reply ends here.");
    type("\004"), ends("a reply alone", 0);
    unlink(file);
}

int main(int argc, char **argv)
{
    program = argc > 1 ? argv[1] : program;
    setenv("TERM", "xterm", 1);
    setenv("OMP_WAIT_POLICY", "passive", 1);
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) < 0 || unlockpt(master) < 0 || !ptsname(master)) {
        printf("not run: a conversation on a terminal, there is no pseudo-terminal\n");
        return printf("0 passed, 0 failed\n"), 0;
    }
    close(master);
    if (!mkdtemp(folder))
        return printf("cannot make %s\n", folder), 1;
    snprintf(history, sizeof history, "%s/history", folder);
    snprintf(file, sizeof file, "%s/file", folder);
    snprintf(script, sizeof script, "%s/script", folder);
    test_keys();
    test_history();
    test_sizes();
    test_signals();
    test_stopping();
    test_lines();
    test_vanishing();
    test_leaving();
    test_progress();
    test_commands();
    test_loading();
    test_full();
    test_too_small();
    unlink(history), unlink(file), unlink(script);
    check(rmdir(folder) == 0, "files are left in %s", folder);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
