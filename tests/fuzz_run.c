/* Targets of tests/fuzz.c that need statics of run.c, its line editor and its reader of JSON:
 * compiled in the place of run.c, with main renamed to run_main. */
#include "../run.c"

void edit_bytes(const uint8_t *data, size_t size);
void read_json(const uint8_t *data, size_t size);

static void keeps(int promise, const char *what)
{
    if (promise)
        return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

/* ---- the line editor ---- */

/* Where the cursor of a terminal is. */
typedef struct {
    size_t row, column, width, height;
    int full; /* on the last column's character, as if behind it */
} cursor;

/* Moves the cursor as the editor's sequences do.  Any sequence that it may not send fails. */
static void move(cursor *c, const char *text, size_t n)
{
    size_t length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t code = next_char(text + i, n - i, &length);
        size_t wide = columns(code);
        if (code == ESCAPE) {
            unsigned long count = strtoul(text + i + 2, NULL, 10);
            size_t digits = strspn(text + i + 2, "0123456789");
            char last = text[i + 2 + digits];
            keeps(text[i + 1] == '[' && digits < 6 && strchr("ACHJ", last), "a sequence is known");
            keeps(last != 'A' || count <= c->row, "the cursor stays on the screen");
            c->row = last == 'H' ? 0 : last == 'A' ? c->row - count : c->row;
            c->column = last == 'H' ? 0 : last == 'C' ? c->column + count : c->column;
            keeps(c->column < c->width, "the cursor stays in its row");
            length = 3 + digits;
        } else if (code == '\r' || code == '\n') {
            c->column = code == '\r' ? 0 : c->column;
            c->row += code == '\n' && c->row + 1 < c->height;
        } else if (code != '\a') {
            keeps(!is_control(code) && code != REPLACEMENT, "text carries no control character");
            if (wide && (c->full || c->column + wide > c->width)) {
                c->row += c->row + 1 < c->height;
                c->column = 0;
            }
            c->full = wide ? c->column + wide == c->width : c->full;
            c->column += c->full && wide ? wide - 1 : wide;
            continue;
        }
        c->full = 0;
    }
}

/* A conversation's keys: 0xFE and two bytes are a new size, 0xFD ends a message. */
void edit_bytes(const uint8_t *data, size_t size)
{
    editor e = {.raw = 1, .marks_pastes = 1};
    cursor c = {0, 0, 80, 24, 0};
    begin_text(&e);
    fit(&e, c.width, c.height, 0);
    for (size_t i = 0; i < size; i++) {
        int complete = 0;
        if (data[i] == 0xFE && i + 2 < size) {
            c.width = 4 + data[i + 1] % 90u;
            c.height = 1 + data[i + 2] % 30u;
            e.screen.n = 0;
            fit(&e, c.width, c.height, 0);
            c.row = e.row - e.top; /* as if nothing else stood there */
            c.column = place_of(&e, e.at).cell % e.width;
            c.full = 0;
            i += 2;
        } else {
            e.typed[0] = (char)data[i];
            e.i = 0, e.n = 1;
            complete = data[i] == 0xFD || take_typed(&e);
        }
        keeps(!e.out.error, "there is memory");
        keeps(e.at <= e.text.n && e.text.n <= e.history.n + size + 1, "the text is bounded");
        keeps(e.n_sequence < sizeof e.sequence && e.recalled <= e.history.n + size, "buffers are");
        if (complete || e.ended) {
            leave_text(&e);
            keeps(append(&e.text, NULL, 0) == DONE &&
                  remember(&e, e.text.items, e.text.n) == DONE, "messages are kept");
            e.ended = 0;
            begin_text(&e);
        } else
            draw(&e, c.height);
        keeps(append(&e.screen, NULL, 0) == DONE, "there is a NUL");
        move(&c, e.screen.items, e.screen.n);
        e.screen.n = 0;
        keeps(c.column == place_of(&e, e.at).cell % e.width && !c.full, "the cursor is where it should be");
        keeps(e.row >= e.top && e.row - e.top <= c.row, "and in its row");
    }
    free(e.history.items), free(e.text.items), free(e.screen.items), free(e.drafts.items);
}

/* ---- JSON ---- */

/* Reads a copy of exactly those bytes, so that a sanitizer sees a step past their end. */
static json *read_copy(const void *bytes, size_t size)
{
    json *j = malloc(sizeof *j);
    char *copy = malloc(size ? size : 1);
    if (!j || !copy)
        exit(1);
    memcpy(copy, bytes, size);
    int sound = json_read(j, copy, size);
    keeps(sound == !j->why && j->at <= size, "a refusal has a reason and a place in the text");
    free(copy);
    return j;
}

static void let_go(json *j)
{
    json_free(j);
    free(j);
}

/* Written and read again a string is what it was. */
static void check_text(const json *j, const json_node *string)
{
    size_t n, again;
    array quoted = {0};
    output out = {.memory = &quoted};
    const char *text = json_text(j, string, &n);
    keeps(text != NULL, "strings are read");
    put_quoted(&out, text, n);
    json *k = read_copy(quoted.items, quoted.n);
    const char *copy = k->why ? NULL : json_text(k, k->nodes.items, &again);
    keeps(copy && again == n && memcmp(copy, text, n + 1) == 0, "strings come back");
    let_go(k);
    free(quoted.items);
}

static void check_node(const json *j, size_t i)
{
    const json_node *node = (const json_node *)j->nodes.items + i, *key = node + 1;
    size_t n;
    keeps(node->start <= node->end && node->end <= j->size && node->next > i &&
          node->next <= j->nodes.n, "a node is in the text and ends behind itself");
    if (node->kind == JSON_STRING)
        check_text(j, node);
    for (size_t k = 0; node->kind == JSON_OBJECT && k < node->n; k++) {
        const char *name = json_text(j, key, &n);
        keeps(name != NULL, "keys are strings");
        keeps(json_find(j, node, name, n) == key + 1, "every key finds its value");
        key = json_next(j, key + 1);
    }
}

/* Where a text is sound its nodes are, too, and part of it is not, nor it with more behind it. */
void read_json(const uint8_t *data, size_t size)
{
    json *j = read_copy(data, size);
    for (size_t i = 0; !j->why && i < j->nodes.n; i++)
        check_node(j, i);
    if (!j->why && ((json_node *)j->nodes.items)->kind != JSON_NUMBER) {
        size_t end = size;
        while (strchr(" \t\r\n", data[end - 1]))
            end--;
        json *cut = read_copy(data, end - 1);
        keeps(cut->why != NULL, "a text without its end is refused");
        let_go(cut);
    }
    let_go(j);
}
