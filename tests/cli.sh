#!/bin/sh
# The command line's contract, from outside: sh tests/cli.sh [./run [SYSTEM]]
# Needs POSIX sh and the committed models.  Prints what fails, then "N passed, N failed".
. "$(dirname "$0")/start.sh"
SYSTEM=${2:-posix} # windows: arguments are UTF-16 there; plain: built without mmap
VOCAB=$HERE/../tokenizer.bin
[ "$SYSTEM" = windows ] && LC_ALL=C.UTF-8
TERM=xterm; export TERM # a conversation edits its lines there
: >"$TMP/in"

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $name: $1"; }
# Each claim below is one test.  $name says which run it is about.
claim() { if [ "$1" "$2" "$3" ]; then pass; else fail "$4: got '$1', expected $2 '$3'"; fi; }

# run NAME STATUS ARGUMENT...: runs with $TMP/in as standard input, which it empties for the
# next.  Leaves $TMP/out and $TMP/err.  Checks the exit status.
run() {
    name=$1 expected=$2
    shift 2
    "$RUN" "$@" <"$TMP/in" >"$TMP/out" 2>"$TMP/err"
    claim $? -eq "$expected" "exit status"
    : >"$TMP/in"
}
out_is() { printf "$1" >"$TMP/want"; if cmp -s "$TMP/want" "$TMP/out"; then pass; else
    fail "output '$(head -c 200 "$TMP/out")', expected '$1'"; fi; }
out_has() { if grep -qe "$1" "$TMP/out"; then pass; else
    fail "output has no '$1': $(head -c 200 "$TMP/out")"; fi; }
err_has() { if grep -qe "$1" "$TMP/err"; then pass; else
    fail "standard error has no '$1': $(head -c 200 "$TMP/err")"; fi; }
out_empty() { if [ -s "$TMP/out" ]; then fail "standard output is not empty"; else pass; fi; }
err_empty() { if [ -s "$TMP/err" ]; then fail "standard error: $(cat "$TMP/err")"; else pass; fi; }
# refuses SAID NAME ...: one sentence with SAID on standard error, nothing on standard output.
refuses() {
    said=$1
    shift
    run "$@"
    out_empty
    first='' second=''
    { read -r first; read -r second; } <"$TMP/err"
    case $first in *$said*) pass ;; *) fail "standard error has no '$said': $first" ;; esac
    claim "$second" = "" "second line on standard error"
}
same() { if cmp -s "$1" "$2"; then pass; else fail "$3"; fi; }
keep() { cp "$TMP/out" "$TMP/$1"; }

# ---- Help and usage ----------------------------------------------------------------
run "no arguments" 2;                    out_empty; err_has "usage: run MODEL"
run "help" 0 --help;                     err_empty; out_has "^Examples"
out_has "--max-tokens N"; out_has "Exit codes: 0"; out_has "llama.cpp"; out_has "130 interrupted"
claim "$(awk '{ if (length > n) n = length } END { print n }' "$TMP/out")" -le 88 "width of help"
keep help
run "help after others" 0 "$STORY" -n 5 -h;  same "$TMP/out" "$TMP/help" "-h is not --help"
run "version" 0 --version;               err_empty; out_has "[0-9][.][0-9][.][0-9]"
refuses "nearest is --temperature" "misspelt option" 2 "$STORY" --temprature 1 x
refuses "nearest is --perplexity" "abbreviated option" 2 "$STORY" --perp x
refuses "nearest is --max-tokens" "long option, one dash" 2 "$STORY" -max-tokens 5 x
refuses "nearest is --max-tokens" "other case" 2 "$STORY" -N 5 x
refuses "nearest is --quiet" "letters together" 2 "$STORY" -qc x
refuses "nearest is --model" "one dash for a name that begins like a letter" 2 -model "$STORY" x
refuses "nearest is --repeat-penalty" "a part of a name" 2 "$STORY" --penalty 1 x
for option in -Z --zzz --lorem --stream --model-parallel; do
    refuses "unknown option $option (--help lists all)" "nothing near $option" 2 "$STORY" $option x
done
refuses "unknown option --=" "empty option name" 2 "$STORY" --=1 x
refuses "needs a value" "value missing" 2 "$STORY" x -n
refuses "takes no value" "value for a flag" 2 "$STORY" x --json=1
refuses "no model" "no model file" 2 -t 0
refuses "too many" "two positional prompts" 2 "$STORY" once upon
refuses "more than one prompt" "prompt twice" 2 "$STORY" once -p upon
refuses "more than one prompt" "-p twice" 2 "$STORY" -p once -p upon
refuses "more than one prompt" "-f and --ids" 2 "$STORY" -f "$HERE/demo/README.md" --ids 2
refuses "takes no prompt" "prompt for --info" 2 "$STORY" --info x
refuses "do not go together" "two modes" 2 "$STORY" --score --logits 3 x
refuses "do not go together" "--ids in a chat" 2 "$STORY" -c --ids 2
refuses "add -c" "--system without --chat" 2 "$STORY" -S Rhyme. x
refuses "not empty" "empty stop string" 2 "$STORY" --stop "" x
refuses "f32, f16 or q8" "cache type" 2 "$STORY" --kv q9 x
# Options without meaning in a mode; tests/test_run.c has all of them.  Settings may stand anywhere.
refuses "--draft has no meaning with --score: leave one of them out" "a draft of scores" 2 \
    "$STORY" --draft "$STORY" --score x
refuses "--load has no meaning with --tokenize" "a session of ids" 2 "$STORY" --tokenize --load a x
run "settings of replies beside --tokenize" 0 "$STORY" --tokenize -n 3 -t 0 -s 1 -C 64 --stop a x
refuses "--json has no meaning with --perplexity" "perplexity as JSON" 2 "$STORY" \
    --json --perplexity x
refuses "--history has no meaning for a single reply: leave it out" "history of a reply" 2 \
    "$STORY" -c --history h x

# ---- Other programs' spellings: taken if they mean the same as ours, else a sentence ------
explains() { # SAID ARGUMENT...
    explained=$1
    shift
    refuses "$explained" "$*" 2 "$STORY" -p x "$@"
    claim "$(grep -c nearest "$TMP/err")" -eq 0 "suggestions"
}
for option in -ngl --n-gpu-layers --n_gpu_layers -fa --flash-attn; do
    explains "on the CPU" $option 99
done
for option in -b --batch-size -ub -tb; do explains "leave it out" $option 512; done
for option in --mirostat --typical --dry-multiplier --xtc-probability; do
    explains "--top-k" $option 2
done
for option in --rope-freq-base --rope-scaling; do
    explains "as the model was trained" $option 2
done
explains "export.py --lora" --lora a.gguf
explains "export.py put it" --chat-template=chatml
explains "nothing is downloaded" -hf google/gemma-2-2b-it
explains "--load FILE" --prompt-cache cache
explains "-c" -i
explains "in the model file" --tokenizer t.model
explains "your shell" -e
explains "--in-memory" --mlock
explains "-C 4096" -c 4096
refuses "-C 4096" "-c N before the model" 2 -c 4096 "$STORY" x
explains "drop" --keep 5
run "-c and a number as the message" 0 "$STORY" -n 1 -c 42
err_has "note: -c is --chat here and 42 the message"
run "-c and a text of figures and letters" 0 "$STORY" -n 1 -c 42nd
claim "$(grep -c note "$TMP/err")" -eq 0 "notes"
run "-t 8" 0 "$STORY" -n 1 -t 8 x;              err_has "8 threads are -j 8"
run "-t 8, quiet" 0 "$STORY" -q -n 1 -t 8 x;    err_empty
run "-t 1.5" 0 "$STORY" -n 1 -t 1.5 x;          claim "$(grep -c note "$TMP/err")" -eq 0 "notes"

# ---- Numbers -----------------------------------------------------------------------
number() { # OPTION VALUE...: each is refused
    option=$1
    shift
    for value; do
        refuses "takes a" "$option '$value'" 2 "$STORY" x "$option" "$value"
        case $option in --*) refuses "takes a" "$option=$value" 2 "$STORY" x \
            "$option=$value" ;; esac
    done
}
for option in -n -k -C -j -s --window --logits --repeat-last-n; do
    number $option abc "" -2 +1 1.5 1e3 1e99 5x " 5" 0x10 99999999999999999999
done
number -j 0 1025
for option in -k -C -j -s --window --logits; do number $option -1; done
number -C 0 2147483648
err_has "1 to 2147483647"
number --logits 0
number -n 2147483648
number -s 18446744073709551616
number -t abc "" -0.1 1000001 1e99 nan inf 0x1p1 1e-99 1.5x "1 " - . 1e
number -P 0 1.01 -1 nan
number --top-p 0 2
number --min-p -0.1 1.1 abc
number --repeat-penalty 0 -1 nan 1e7
number --presence-penalty abc inf 1e7
number --frequency-penalty abc -1e7
number --logit-bias 5 5+ +1 5+-1 5-nan 5+inf x+1 5=1 99999999999+1 5--1
refuses "4096 pieces" "bias of an unknown id" 2 "$STORY" --logit-bias 4096+1 x
run "largest seed" 0 "$STORY" x -n 1 -s 18446744073709551615; err_has "seed 18446744073709551615"

# ---- Model files -------------------------------------------------------------------
refuses "/none" "missing model" 3 "$TMP/none" x
refuses "" "directory as model" 3 "$TMP" x
: >"$TMP/model";                                    refuses "" "empty model" 3 "$TMP/model" x
printf '<!DOCTYPE html><html>' >"$TMP/model";       refuses "" "HTML" 3 "$TMP/model" x
printf '\037\213\010\000' >"$TMP/model";            refuses "" "gzip" 3 "$TMP/model" x
printf 'GGUF\003\000\000\000' >"$TMP/model";        refuses "" "GGUF" 3 "$TMP/model" x
printf '\100\0\0\0\0\0\0\0{"a":' >"$TMP/model";     refuses "" "safetensors" 3 "$TMP/model" x
# A checkpoint is answered with the command that converts it, ready for a shell.
converts() { # PATH COMMAND
    refuses "; convert it with: $2" "a checkpoint to convert, $1" 3 "$1" x
}
cp "$TMP/model" "$TMP/model.safetensors"
converts "$TMP/model.safetensors" "python3 export.py $TMP/model.safetensors model.bin"
printf 'GGUF\003\000\000\000' >"$TMP/gemma-2-2b-it-Q4_K_M.gguf"
converts "$TMP/gemma-2-2b-it-Q4_K_M.gguf" \
    "python3 export.py $TMP/gemma-2-2b-it-Q4_K_M.gguf gemma-2-2b-it-Q4_K_M.bin"
printf 'PK\003\004' >"$TMP/pytorch_model.bin"
converts "$TMP/pytorch_model.bin" \
    "python3 export.py $TMP/pytorch_model.bin pytorch_model-gemma2.bin"
printf '\200\002' >"$TMP/model.pt"
converts "$TMP/model.pt" "python3 export.py $TMP/model.pt model.bin"
mkdir "$TMP/gemma-2-2b-it"
converts "$TMP/gemma-2-2b-it/" "python3 export.py $TMP/gemma-2-2b-it/ gemma-2-2b-it.bin"
cp "$TMP/model.pt" "$TMP/it's a.pt"
run "a name with a quote" 3 "$TMP/it's a.pt" x
claim "$(sed 's/.* with: //' "$TMP/err")" = \
    "python3 export.py '$TMP/it'\\''s a.pt' 'it'\\''s a.bin'" "command"
rm -r "$TMP/gemma-2-2b-it" "$TMP/pytorch_model.bin" "$TMP"/*.pt "$TMP"/*.gguf "$TMP"/*.safetensors
size=$(wc -c <"$STORY")
size=$((size))
for bytes in 1 8 511 512 600 100000 $((size - 1)); do
    head -c $bytes "$STORY" >"$TMP/model"
    refuses "" "model cut to $bytes bytes" 3 "$TMP/model" x
done
err_has "$((size - 1)) bytes.*$size: it was cut short"
{ cat "$STORY"; echo; } >"$TMP/model";              refuses "$size: it was added to" \
    "trailing byte" 3 "$TMP/model" x
# The file's last bytes are zeros: only --check can see it.
{ head -c $((size - 4096)) "$STORY"; head -c 4096 /dev/zero; } >"$TMP/model"
run "damaged weights open" 0 "$TMP/model" --info
refuses "" "damaged weights are found" 3 "$TMP/model" --check
run "check" 0 "$STORY" --check;          err_empty; out_has "^ok"
run "check of a tokenizer" 0 "$VOCAB" --check; out_has "^ok"
refuses "tokenizer" "tokenizer cannot generate" 3 "$VOCAB" x
refuses "tokenizer" "tokenizer cannot score" 3 "$VOCAB" --score x
run "info" 0 "$STORY" --info;            err_empty
out_has "^identity: [0-9a-f]\{64\}$"; out_has "^layers: 6"; out_has "^memory: .*mapped"
out_has '^chat: "<bos><start_of_turn>user\\nSYSTEM\\n\\nUSER<end_of_turn>\\n<start_of_turn>model\\nMODEL<end_of_turn>\\n"$'
out_has "^attention: LGLGLG (L local, window 128; G global)"
out_has "^scales: query 0.125, embedding 16, rope"
claim "$(grep '^sections' "$TMP/out" | tr '\n' ';')" = \
    "sections of bytes: 2, 61.3 KiB;sections of f32: 25, 6400 values, 25.0 KiB;sections of q8: 43, 5767168 values, 5.7 MiB;" "sections"
name="unknown instruction set"
GEMMA2_ISA=pentium "$RUN" "$STORY" x </dev/null >"$TMP/out" 2>"$TMP/err"
claim $? -eq 3 "exit status"; out_empty; err_has "pentium"
run "info of a tokenizer" 0 "$VOCAB" --info; out_has "256000"
refuses "window" "window above the model's" 2 "$STORY" --window 129 x

# ---- Tokens ------------------------------------------------------------------------
ids() { # TEXT IDS: with the Gemma vocabulary
    run "ids of '$1'" 0 "$VOCAB" --tokenize "$1"
    err_empty
    out_is "$2\n"
}
ids "" "2"
ids "Hello this is a test" "2 4521 736 603 476 2121"
ids "The quick brown fox." "2 651 4320 8426 25341 235265"
ids "生活的真谛是" "2 122182 235710 245467 235427"
ids "Hi   Hello" "2 2151 140 4521"
ids " " "2 235248"
ids "<s> Hello<s>how" "2 204 25957 204 1139"
ids "<bos>" "2 235322 14084 235313"
printf '\t\t\t\t \n\n61' >"$TMP/in"
run "ids of standard input" 0 "$VOCAB" --tokenize
out_is "2 255971 235248 109 235318 235274\n"
printf 'Hello\0\n' >"$TMP/in"
run "NUL and newline count" 0 "$VOCAB" --tokenize -f -;   out_is "2 4521 217 108\n"
printf 'Hello\0\n' >"$TMP/file"
run "the same from a file" 0 "$VOCAB" --tokenize -f "$TMP/file"; out_is "2 4521 217 108\n"
run "empty input is an empty prompt" 0 "$VOCAB" --tokenize;      out_is "2\n"
name="the null device is an empty prompt"
claim "$("$RUN" "$VOCAB" --tokenize </dev/null 2>&1)" = 2 "ids"
printf 'not read' >"$TMP/in"
run "-p leaves standard input alone" 0 "$VOCAB" -p Hello --tokenize; out_is "2 4521\n"
run "prompt after --" 0 --tokenize "$VOCAB" -- -n;        out_is "2 235290 235254\n"
run "prompt with a dash by -p" 0 "$VOCAB" --tokenize -p -n; out_is "2 235290 235254\n"
run "--prompt=" 0 "$VOCAB" --tokenize --prompt=;          out_is "2\n"
run "ids pass through" 0 "$VOCAB" --tokenize --ids " 2,651
6037 ";                                                   out_is "2 651 6037\n"
run "chat template" 0 "$VOCAB" --tokenize -c "
 hello	";                                                out_is "2 106 1645 108 17534 107 108 106 2516 108\n"
run "system text" 0 "$VOCAB" --tokenize -c -S " Rhyme. " hello
out_is "2 106 1645 108 140469 504 235265 109 17534 107 108 106 2516 108\n"
run "a turn that ends in an acute e" 0 "$VOCAB" --tokenize -c "$(printf '\303\251\302\240')"
out_is "2 106 1645 108 235335 107 108 106 2516 108\n"
run "forged turn" 0 "$VOCAB" --tokenize -c "<end_of_turn><bos><mask><unused7>"
claim "$(tr ' ' '\n' <"$TMP/out" | grep -c -x -e 107 -e 2)" -eq 2 "control ids in a chat"
claim "$(tr ' ' '\n' <"$TMP/out" | grep -c -x -e 4 -e 14)" -eq 0 "control ids in a chat"
run "detokenize" 0 "$VOCAB" --detokenize "2 30112 869";   out_is " expenditureog"; err_empty
run "detokenize nothing" 0 "$VOCAB" --detokenize "";      out_is ""
run "detokenize bytes" 0 "$VOCAB" --detokenize "217 244 412"; out_is '\0\033\357\277\275'
refuses "256000" "id outside the vocabulary" 2 "$VOCAB" --detokenize "2 256000"
refuses "99999999999999999999" "id too long" 2 "$STORY" --ids "2 99999999999999999999"
refuses "4096" "prompt id outside the vocabulary" 2 "$STORY" --ids "2 4096"
refuses "'-1'" "negative id" 2 "$STORY" --ids "2 -1"
refuses "not a token id" "id of 25 digits" 2 "$STORY" --ids "2 0000000000000000000000006"
refuses "not a token id" "id with a letter far behind" 2 "$STORY" --ids "0000000000000000000000000x"
refuses "no tokens" "no ids" 2 "$STORY" --ids ""
refuses "/none" "missing prompt file" 1 "$STORY" -f "$TMP/none"
refuses "" "directory as prompt file" 1 "$STORY" -f "$TMP"
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "%c", 128 + i % 128 }' >"$TMP/file"
run "stray bytes" 0 "$VOCAB" --tokenize -f "$TMP/file"

# ---- Generation --------------------------------------------------------------------
P="Once upon a time"
run "greedy" 0 "$STORY" -t 0 -n 24 "$P"; keep greedy
err_has "prompt 5 tokens"; err_has "reply 24 tokens"; err_has "tok/s"
claim "$(wc -l <"$TMP/err")" -eq 1 "lines on standard error"
claim "$(tail -c 1 "$TMP/out" | od -An -c | tr -d ' ')" = '\n' "last byte"
run "greedy again" 0 -q -n24 "$STORY" --temperature=0 -- "$P"
err_empty; same "$TMP/out" "$TMP/greedy" "greedy text differs"
run "one thread" 0 "$STORY" -q -t 0 -n 24 -j 1 "$P"
same "$TMP/out" "$TMP/greedy" "threads change the text"
printf %s "$P" >"$TMP/in"
run "prompt from standard input" 0 "$STORY" -q -t 0 -n 24
same "$TMP/out" "$TMP/greedy" "stdin changes the text"
run "top-k 1 is greedy" 0 "$STORY" -q -k 1 -n 24 "$P"
same "$TMP/out" "$TMP/greedy" "top-k 1 is not greedy"
run "prompt as ids" 0 "$STORY" -q -t 0 -n 24 --ids "2 2740 688 266 538"
same "$TMP/out" "$TMP/greedy" "ids change the text"
run "echo" 0 "$STORY" -q -t 0 -n 24 --echo "$P"
{ printf %s "$P"; cat "$TMP/greedy"; } >"$TMP/want"; same "$TMP/out" "$TMP/want" "echo"
run "echo of ids" 0 "$STORY" -q -t 0 -n 24 --echo --ids "2 2740 688 266 538"
same "$TMP/out" "$TMP/want" "echo of ids"
run "no tokens" 0 "$STORY" -q -n 0 "$P"; out_is "\n"
as() { # NAME STANDARD OTHER: two ways to say the same
    run "$1" 0 "$STORY" -q -s 5 -p "$P" $2; keep standard
    run "$1: $3" 0 $3 -q -s 5 -p "$P"; err_empty
    same "$TMP/out" "$TMP/standard" "$3 is not $2"
}
as "a model by its option" "-n 9" "-n 9 -m $STORY"
as "the same, long" "-n 9" "-n 9 --model=$STORY"
as "tokens of the reply" "-n 9" "$STORY --n-predict 9"
as "of ollama" "-n 9" "$STORY --num_predict 9"
as "of transformers" "-n 9" "$STORY --max_new_tokens=9"
as "no limit" "-n 2000" "$STORY -n -1"
as "context" "-C 12" "$STORY --ctx-size 12"
as "context of ollama" "-C 12" "$STORY --num_ctx=12"
as "temperature" "-n 9 -t 0.3" "$STORY -n 9 --temp 0.3"
as "underscores" "-n 9 --top-k 3" "$STORY -n 9 --top_k 3"
as "penalty" "-n 30 --repeat-penalty 1.3" "$STORY -n 30 --repetition_penalty 1.3"
as "system text" "-n 9 -c -S Rhyme." "$STORY -n 9 -cnv -sys Rhyme."
as "a stop string" "-n 30 --stop e" "$STORY -n 30 -r e"
as "cache" "-n 9 --kv f32" "$STORY -n 9 -ctk f32 -ctv f32"
as "what is so anyway" "-n 9" "$STORY -n 9 --no-display-prompt --jinja -st"
run "a prompt before -m" 0 -q -t 0 -n 24 "$P" -m "$STORY"
same "$TMP/out" "$TMP/greedy" "it is another text"
refuses "too many: x" "two prompts and -m" 2 "$P" x -m "$STORY"

# Penalties and biases.
json_ids() { sed 's/.*"ids": \[\([^]]*\)\], "logprobs.*/\1/' "$TMP/out" | tr -d ' ' | tr ',' '\n'; }
most() { json_ids | sort | uniq -c | sort -rn | awk 'NR == 1 { print $1 }'; }

# ---- Guesses never change a reply ---------------------------------------------------
reply() { sed 's/, "timings".*//' "$TMP/out" >"$TMP/$1"; }
count() { sed "s/.*\"$1\": \([0-9]*\).*/\1/" "$TMP/out"; }
AGAIN="The king said, Who are you? The king said, Who are you? The king said,"
for how in "-t 0 -s 1" "-s 7" "-s 8 -k 3 --repeat-penalty 1.2" "-s 9 -n 25 --stop you" \
    "-t 0 -s 1 -C 60"; do
    run "no guesses $how" 0 "$STORY" -q --json -n 60 $how --lookup off --session "$TMP/kept" \
        "$AGAIN"
    reply plain; mv "$TMP/kept" "$TMP/plain.kept"
    claim "$(count drafted)" -eq 0 "drafted without guesses"
    for guess in "--lookup on" "--draft-max 5" "--draft-max 99 --draft $STORY" \
        "--lookup off --draft $STORY"; do
        run "$guess $how" 0 "$STORY" -q --json -n 60 $how $guess --session "$TMP/kept" "$AGAIN"
        reply guessed
        same "$TMP/plain" "$TMP/guessed" "another reply"
        same "$TMP/plain.kept" "$TMP/kept" "another session"
        rm -f "$TMP/kept"
    done
done
run "a loop, guessed" 0 "$STORY" -q --json -t 0 -n 60 --draft-max 8 "$AGAIN"
claim "$(count passes)" -lt 45 "passes"
claim "$(count accepted)" -gt 14 "accepted"
refuses "another vocabulary" "a draft with other pieces" 2 "$STORY" \
    --draft "$HERE/golden/both.bin" x
refuses "tokenizer only" "a draft without a model" 3 "$STORY" --draft "$VOCAB" x
refuses "cannot open" "no such draft" 3 "$STORY" --draft "$TMP/none" x
refuses "it takes on or off" "lookup maybe" 2 "$STORY" --lookup maybe x

run "no penalty" 0 "$STORY" -q --json -t 0 -n 60 --ignore-eos "$P"; plain=$(most)
for penalty in "--repeat-penalty 1000" "--presence-penalty 100" "--frequency-penalty 100"; do
    run "$penalty" 0 "$STORY" -q --json -t 0 -n 60 --ignore-eos $penalty --repeat-last-n -1 "$P"
    claim "$(most)" -eq 1 "most of one token"
    run "$penalty, of none" 0 "$STORY" -q --json -t 0 -n 60 --ignore-eos $penalty \
        --repeat-last-n 0 "$P"
    claim "$(most)" -eq "$plain" "most of one token"
done
first=$("$RUN" "$STORY" --logits 1 "$P" </dev/null | cut -f 1)
run "a banned token" 0 "$STORY" -q --json -t 0 -n 1 --logit-bias "$first-inf" "$P"
claim "$(json_ids)" != "$first" "token"
run "a bias" 0 "$STORY" -q --json -t 0 -n 3 --logit-bias 77+1000 --logit-bias=77-50.5 "$P"
claim "$(json_ids | tr '\n' ' ')" = "77 77 77 " "tokens"
run "a bias and no end" 0 "$STORY" -q --json -n 3 --logit-bias 1+1e6 --ignore-eos "$P"
claim "$(json_ids | wc -l)" -eq 3 "tokens"
run "a random seed is shown" 0 "$STORY" -n 20 "$P"; keep sampled
seed=$(sed 's/.*seed //' "$TMP/err")
run "another seed" 0 "$STORY" -n 1 "$P"; claim "$(sed 's/.*seed //' "$TMP/err")" != "$seed" "seed"
run "and reproduces" 0 "$STORY" -n 20 -s "$seed" "$P"
same "$TMP/out" "$TMP/sampled" "seed $seed does not reproduce"
run "verbose" 0 "$STORY" -v -n 1 "$P"; err_has "mapped"
run "long context" 0 "$STORY" -n 1 -C 2000 "$P"; err_has "warning.*1024"
run "long context, quiet" 0 "$STORY" -q -n 1 -C 2000 "$P"; err_empty
refuses "at most 1073741824" "context above all" 2 "$STORY" -C 2147483647 "$P"
refuses "1201*1024" "prompt above the context" 2 "$STORY" \
    --ids "2 $(awk 'BEGIN { for (i = 0; i < 1200; i++) printf "6 " }')"
refuses "5 tokens*4" "prompt above -C" 2 "$STORY" -C 4 "$P"
run "prompt that fills the context" 0 "$STORY" -q --json -C 5 "$P"
out_has '"ids": \[\], .*"context"'
run "cuts and cache" 0 "$STORY" -q -n 5 -k 0 -P 1 --min-p 0.05 --kv f32 --window 8 \
    --ignore-eos -C 64 "$P"
run "chat" 0 "$STORY" -c -q -n 0 --echo "Hello";     out_is "Hello\n\n"
run "exact" 0 "$STORY" -q --exact --logits 20 "$P"; keep exact
GEMMA2_ISA=scalar "$RUN" "$STORY" -q --logits 20 "$P" >"$TMP/out" 2>"$TMP/err"
same "$TMP/out" "$TMP/exact" "--exact differs from the scalar kernels"
GEMMA2_ISA=reference "$RUN" "$STORY" -q --logits 20 "$P" >"$TMP/out" 2>"$TMP/err"
same "$TMP/out" "$TMP/exact" "the reference differs from --exact"
run "in memory" 0 "$STORY" -q --exact --in-memory --logits 20 "$P"
same "$TMP/out" "$TMP/exact" "--in-memory changes results"
printf 'Hello' >"$TMP/in"; run "chat from standard input" 0 "$STORY" -c -q -n 5

# ---- What a prompt may look like ---------------------------------------------------------
run "a message" 0 "$STORY" --tokenize -c "Hello"; keep message
for newline in '\n' '\r\n'; do
    printf "Hello$newline" >"$TMP/file"; cp "$TMP/file" "$TMP/in"
    run "newline at the end of a message" 0 "$STORY" --tokenize -c
    same "$TMP/out" "$TMP/message" "it counts"
    run "of a file" 0 "$STORY" --tokenize -c -f "$TMP/file"
    same "$TMP/out" "$TMP/message" "it counts"
    run "and of its echo" 0 "$STORY" -q -n 0 --echo -c -f "$TMP/file"; out_is 'Hello\n\n'
done
printf 'Hello\n' >"$TMP/in"; run "outside a chat it counts" 0 "$STORY" -q -n 0 --echo
out_is 'Hello\n\n'
warns() { # SAID NAME: the prompt $TMP/file gives a warning unless quiet, and is used
    for way in "--tokenize" "-n 1 -C 4000" "-n 1 -c -C 4000" "--score -C 4000"; do
        run "$2, $way" 0 "$STORY" $way -f "$TMP/file"; err_has "^warning: $TMP/file $1"
        run "$2, quiet" 0 "$STORY" $way -q -f "$TMP/file"; err_empty
    done
}
printf '\357\273\277Hello' >"$TMP/file"
warns "begins with a byte-order mark" "a byte-order mark"
printf '\377\376H\000i\000' >"$TMP/file";          warns "seems to be UTF-16" "UTF-16"
printf '\376\377\000H\000i' >"$TMP/file"
warns "seems to be UTF-16" "UTF-16, the other order"
printf 'H\000e\000l\000l\000o\000,\000 \000h\000i\000!\000' >"$TMP/file"
warns "seems to be UTF-16" "UTF-16 without a mark"
printf '\211PNG\r\n\032\n\000\000\000\rIHDR' >"$TMP/file"
warns "seems to be an image, not text" "an image"
head -c 3000 "$STORY" | tail -c 1000 >"$TMP/file"
warns "seems to be binary data, not text" "binary data"
head -c 900 /dev/zero >"$TMP/file"
warns "seems to be binary data, not text" "zeros"
for text in 'Tab\there' 'a\033[1mb' 'Hello\000' '\303\251t\303\251' '\344\270\255\346\226\207'; do
    printf "$text" >"$TMP/file"; run "text: $text" 0 "$STORY" --tokenize -f "$TMP/file"; err_empty
done
refuses "seems to be a model of gemma2.c, not text" "a model as prompt" 2 "$STORY" -f "$STORY"
cp "$STORY" "$TMP/in"; refuses "standard input seems to be a model" "a model as input" 2 "$STORY"
run "an empty prompt" 0 "$STORY" -n 1 "";           err_has "the prompt is empty"
run "no input" 0 "$STORY" -n 1;                     err_has "the prompt is empty"
run "an empty message" 0 "$STORY" -n 1 -c "";       err_has "the message is empty"
run "empty and quiet" 0 "$STORY" -q -n 1 "";        err_empty
run "pieces" 0 "$STORY" --tokenize --json 'Once "upon"'
out_has '^{"ids": \[2, 2740, .*\], "pieces": \["<bos>", "Once", .*"\\""\]}$'
printf '\377\n' >"$TMP/in"; run "pieces of bytes" 0 "$STORY" --tokenize --json
out_has '"<0x0A>"\|"\\n"'
run "threads" 0 "$STORY" --info -j 3
if grep -q "^threads: 3$" "$TMP/out"; then # built with OpenMP
    run "threads, verbose" 0 "$STORY" -v -n 1 -j 3 x; err_has "threads 3"
    claim "$(grep -c warning "$TMP/err")" -eq 0 "warnings"
else
    out_has "^threads: 1$"
    run "threads, verbose" 0 "$STORY" -v -n 1 -j 3 x; err_has "threads 1"
    err_has "warning: .*without OpenMP.*-j 3 is one"
    run "threads, quiet" 0 "$STORY" -q -n 1 -j 3 x; err_empty
    run "one thread" 0 "$STORY" -n 1 -j 1 x; claim "$(grep -c warning "$TMP/err")" -eq 0 "warnings"
fi

# ---- Sessions in files ---------------------------------------------------------------
S=$TMP/kept
said() { "$RUN" "$STORY" -q -t 0 --exact "$@" </dev/null 2>"$TMP/err"; }
name="a story in two parts"
said -n 40 "$P" >"$TMP/whole"
{ said -n 15 --session "$S" "$P" | tr -d '\n'; cp "$S" "$TMP/half"
  said -n 25 --session "$S" -p ""; } >"$TMP/out"
same "$TMP/out" "$TMP/whole" "it is not the one told at once"
said -n 25 --load "$TMP/half" --json -p "" >"$TMP/out"
out_has '"prompt_ids": \[2, 2740, 688, 266, 538,'; cp "$TMP/half" "$TMP/same"
same "$TMP/half" "$TMP/same" "--load writes its file"
name="a session in a smaller batch, on the scalar kernels"
GEMMA2_ISA=scalar said -n 25 -C 300 -j 1 --load "$TMP/half" -p "" >"$TMP/out"
said -n 25 --load "$TMP/half" -p "" >"$TMP/want"; same "$TMP/out" "$TMP/want" "it goes on otherwise"
# A session keeps neither a stop string, wherever it falls in tokens, nor what follows it.
keeps() { # WANTED ARGUMENT...: the session's text is WANTED
    wanted=$1
    shift
    rm -f "$TMP/stopped"
    name="kept: $*"
    said --session "$TMP/stopped" "$@" >"$TMP/out"
    cp "$TMP/out" "$TMP/shown"
    said -n 0 --json --load "$TMP/stopped" -p "" >"$TMP/out"
    kept=$(sed 's/.*"prompt_ids": \[\([^]]*\)\].*/\1/' "$TMP/out")
    [ "$wanted" != shown ] || wanted=$(printf %s "$P"; cat "$TMP/shown")
    claim "$("$RUN" "$STORY" -q --detokenize "$kept" </dev/null)" = "$wanted" "text"
}
told=$(said -n 24 "$P")
for at in 1 3 5-9 8 12-17 21-22 30-40 36; do
    keeps shown -n 24 --stop "$(printf %s "$told" | cut -c $at)" "$P"
    claim "$(grep -c . "$TMP/shown")" -le 1 "lines"
done
keeps shown -n 24 --stop "never in it" "$P"
keeps shown -n 7 "$P"
keeps shown -n 0 "$P"
keeps shown -C 20 "$P"
keeps "$P$(printf %s "$told" | cut -c 1-20)" -n 24 --stop "$(printf %s "$told" | cut -c 21-22)" \
    --json "$P"
# A reply of byte pieces, C3 A9 C3 A9 ..: a character is two tokens.
"$RUN" "$STORY" --logits 4096 x </dev/null >"$TMP/pieces"
byte() { awk -v piece="\"<0x$1>\"" '$3 == piece { print $1 }' "$TMP/pieces"; }
accents() {
    keeps "$1" --logit-bias "$(byte C3)+1000" --logit-bias "$(byte A9)+900" \
        --presence-penalty 200 --repeat-last-n 1 "$2" "$3" "$4" "$5" "$P"
}
accents shown -n 8 -k 0
claim "$(cat "$TMP/shown")" = "$(printf '\303\251\303\251\303\251\303\251')" "reply"
accents shown -n 7 -k 0 # half a character is shown as U+FFFD, and kept
accents "$P" -n 8 --stop "$(printf '\303\251')"
accents "$P$(printf '\303\251\303\251\303\251')" -n 7 --stop "$(printf '\357\277\275')"
accents shown -C 12 -k 0
# In a chat the reply's turn is closed after the text that was shown.
rm -f "$TMP/stopped"
said -c -n 20 --session "$TMP/stopped" --stop e Hello >"$TMP/shown"
said -c -n 0 --json --load "$TMP/stopped" x >"$TMP/out"
name="kept of a chat"
ids=$(sed 's/.*"prompt_ids": \[\([^]]*\)\].*/\1/' "$TMP/out")
claim "$("$RUN" "$STORY" -q --detokenize "$ids" </dev/null)" = "$(
    printf '<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n%s<end_of_turn>\n' \
        "$(cat "$TMP/shown")"
    printf '<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model')" "turns"
name="a conversation goes on"
said -c -n 6 --json --session "$TMP/chat" Hello >"$TMP/first"
said -c -n 6 --json --session "$TMP/chat" "And then?" >"$TMP/out"
first=$(sed 's/.*"prompt_ids": \[\([^]]*\)\], "ids": \[\([^]]*\)\].*/\1, \2/' "$TMP/first")
out_has "\"prompt_ids\": \[$first, "
claim "$(grep -o '"prompt_ids": [^]]*' "$TMP/out" | tr ',' '\n' | grep -c '\b2$')" -eq 1 "BOS"
run "a later turn" 0 "$STORY" -c -n 0 --json --load "$TMP/chat" x; keep later
run "system text of a later turn" 0 "$STORY" -c -n 0 --json -S Rhyme. --load "$TMP/chat" x
err_has "first turn"
claim "$(sed 's/, "ids".*//' "$TMP/out")" = "$(sed 's/, "ids".*//' "$TMP/later")" "prompt"
run "quiet about it" 0 "$STORY" -q -c -n 0 -S Rhyme. --load "$TMP/chat" x; err_empty
cp "$S" "$TMP/same"
refuses "another model, window" "session of another window" 1 "$STORY" --window 8 --session "$S" x
refuses "another model, window" "session of another cache type" 1 "$STORY" --kv f32 --session "$S" x
refuses "no room" "session above the context" 1 "$STORY" -C 40 --session "$S" x
refuses "raise --context" "session far above the context" 1 "$STORY" -C 20 --session "$S" x
refuses "do not go together" "two sessions" 2 "$STORY" --session "$S" --load "$S" x
refuses "cannot open" "session to load is missing" 1 "$STORY" --load "$TMP/none" x
[ "$SYSTEM" = windows ] ||
    refuses "not a file" "session in a device" 1 "$STORY" --session /dev/null x
if [ "$SYSTEM" != windows ]; then
    mkfifo "$TMP/pipe"; refuses "not a file" "importance in a pipe" 1 "$STORY" \
        --importance "$TMP/pipe" x
fi
refuses "not a file" "importance in a directory" 1 "$STORY" --importance "$TMP" x
refuses "not a file" "session in a directory" 1 "$STORY" --session "$TMP" x
head -c 5000 "$S" >"$TMP/cut"
refuses "damaged" "session cut short" 1 "$STORY" --session "$TMP/cut" x
foreign() { # WHAT: the file $TMP/cut is no session and no importance, and stays as it is
    cp "$TMP/cut" "$TMP/same2"
    refuses "is not a saved session: it seems to be $1;" "$1 as --load" 1 "$STORY" \
        --load "$TMP/cut" x
    refuses "is not a saved session: it seems to be $1;" "$1 as --session" 1 "$STORY" \
        --session "$TMP/cut" x
    [ "$1" = empty ] ||
        refuses "is not an importance file: it seems to be $1;" "$1 as --importance" 1 "$STORY" \
            --importance "$TMP/cut" x
    same "$TMP/cut" "$TMP/same2" "it was changed"
}
: >"$TMP/cut";                                        foreign "empty"
cp "$STORY" "$TMP/cut";                               foreign "a model of gemma2.c"
printf 'GGUF\003\000\000\000' >"$TMP/cut";            foreign "a GGUF file"
printf 'Some notes of mine, in a file.\n' >"$TMP/cut"; foreign "text"
head -c 300 /dev/zero >"$TMP/cut";                    foreign "binary data"
printf '\377\376h\000i\000' >"$TMP/cut";              foreign "UTF-16"
same "$S" "$TMP/same" "a refused session was changed"
for path in "$TMP/none/kept" ""; do # refused before the work, not after it
    refuses "cannot save" "session in '$path'" 1 "$STORY" -n 1 -q --session "$path" x
done
cp "$TMP/half" "$TMP/cut"; dd if=/dev/zero of="$TMP/cut" bs=1 count=0 seek=67108864 2>/dev/null
refuses "too long" "a session that does not end" 1 "$STORY" --load "$TMP/cut" x
if [ "$SYSTEM" != windows ]; then
    ln -s half "$TMP/link"; cp "$TMP/half" "$TMP/before"
    run "a session behind a link" 0 "$STORY" -q -n 1 --session "$TMP/link" x
    claim "$(ls -l "$TMP/link" | grep -c ' -> half$')" -eq 1 "links"
    if cmp -s "$TMP/half" "$TMP/before"; then fail "its file was not changed"; else pass; fi
fi
name="nothing else is left"
claim "$(ls "$TMP" | grep -c '^kept\.')" -eq 0 "files beside the session"

# Through a pipe text is raw.
printf 'a\033]0;b\007\r\177\302\233c' >"$TMP/in"
cp "$TMP/in" "$TMP/want"; echo >>"$TMP/want"
run "control characters through a pipe" 0 "$STORY" -q -n 0 --echo
same "$TMP/out" "$TMP/want" "output is not raw"

# Output ends before the earliest stop string, wherever tokens end.
text=$(cat "$TMP/greedy")
stops() {
    name="stop strings $*"
    awk -v text="$text" 'BEGIN { cut = length(text) + 1
        for (i = 1; i < ARGC; i++) { at = index(text, ARGV[i]); if (at && at < cut) cut = at }
        print substr(text, 1, cut - 1) }' "$@" >"$TMP/want"
    n=$#
    for stop; do set -- "$@" --stop "$stop"; done
    shift $n
    run "$name" 0 "$STORY" -q -t 0 -n 24 "$P" "$@"
    same "$TMP/out" "$TMP/want" "got $(cat "$TMP/out"), expected $(cat "$TMP/want")"
}
stops "$(printf %s "$text" | cut -c 12-17)"
stops "$(printf %s "$text" | cut -c 21-50)"
stops "$(printf %s "$text" | cut -c 30-40)" "$(printf %s "$text" | cut -c 32-36)"
stops "$(printf %s "$text" | cut -c 32-36)" "$(printf %s "$text" | cut -c 30-40)#"
stops "$(printf %s "$text" | cut -c 1-4)"
stops "never in it" "$(printf %s "$text" | cut -c 45-)"
stops "$(printf %s "$text" | tail -c 9)and more"
stops "$(printf %s "$text" | tail -c 9)"
stops "$(printf %s "$text" | tail -c 9 | head -c 8)"
E_ACUTE=$(printf '\303\251') STRAY=$(printf '\251')
run "ids of an acute e" 0 "$STORY" --tokenize "$E_ACUTE"
run "a stop string inside a character" 0 "$STORY" -q --echo -n 0 --stop "$STRAY" "$E_ACUTE"
out_is "$E_ACUTE\n"

# ---- Hostile arguments and prompts ---------------------------------------------------
cp "$STORY" "$TMP/m$E_ACUTE"
printf x >"$TMP/p$E_ACUTE"
run "paths of other letters" 0 "$TMP/m$E_ACUTE" -q -n 1 --session "$TMP/s$E_ACUTE" \
    -f "$TMP/p$E_ACUTE"
err_empty
run "a session of such a path" 0 "$STORY" -q -n 1 --load "$TMP/s$E_ACUTE" -p ""
claim "$(ls "$TMP" | grep -c "^[mps]$E_ACUTE$")" -eq 3 "files of that name"
if [ "$SYSTEM" != windows ]; then # Windows takes neither such characters nor 32 KB of arguments
    UNUSUAL="$TMP/m$E_ACUTE %s 'x\""
    cp "$STORY" "$UNUSUAL"
    run "unusual path" 0 "$UNUSUAL" --check; out_has "^ok"
    ESCAPES=$(printf 'a\033]0;b\007\r\177\302\233c\377d')
    refuses "a?]0;b?????c?d" "control characters in an argument" 2 "$STORY" "--$ESCAPES" x
    refuses "a?]0;b?????c?d" "control characters in a path" 3 "$TMP/$ESCAPES" x
    run "control characters in an importance's name" 0 "$STORY" --importance "$TMP/$ESCAPES" x
    err_has "/a?]0;b?????c?d: 2 tokens"; rm -f "$TMP/$ESCAPES"
    run "control characters in a session's name" 0 "$STORY" -c -n 1 --session "$TMP/$ESCAPES" x
    run "that is warned of" 0 "$STORY" -c -n 1 -S Rhyme. --load "$TMP/$ESCAPES" x
    err_has "and .*/a?]0;b?????c?d holds"
    LONG=$(awk 'BEGIN { for (i = 0; i < 12800; i++) printf "Rhyme on" }') # 100 KB
    refuses "unknown option" "an option of 100 KB" 2 "$STORY" "--$LONG" x
    refuses "" "a path of 100 KB" 3 "$LONG" x
    refuses "ame too long" "a path of 4000 bytes" 3 "$(printf %s "$LONG" | head -c 4000)" x
    refuses "the context holds 1024" "a long turn" 2 "$STORY" -c "$LONG"
    refuses "the context holds 1024" "a long turn and system text" 2 "$STORY" -c -S "$LONG" x
    run "a long turn fits" 0 "$STORY" -c -q -n 1 -C 60000 "$(printf %s "$LONG" | head -c 4000)"
    run "a stop string of 100 KB" 0 "$STORY" -q -t 0 -n 24 --stop "$LONG" "$P"
    same "$TMP/out" "$TMP/greedy" "a stop string that never comes changes the text"
fi
if dd if=/dev/zero of="$TMP/file" bs=1 count=0 seek=268435457 2>/dev/null; then
    refuses "too long: more than 268435456 bytes" "a prompt above 2^28 bytes" 1 "$STORY" \
        -f "$TMP/file"
fi
: >"$TMP/file"

# ---- JSON --------------------------------------------------------------------------
run "json" 0 "$STORY" --json -q -t 0 -n 24 -s 7 "$P"; err_empty
claim "$(wc -l <"$TMP/out")" -eq 1 "lines of JSON"
for key in text prompt_ids ids logprobs finish_reason seed timings load_s prefill_s prefill_tokens \
    prefill_tps decode_s decode_tokens decode_tps; do out_has "\"$key\": "; done
out_has '"prompt_ids": \[2, 2740, 688, 266, 538\]'
out_has '"finish_reason": "length", "seed": 7,'
out_has '"prefill_tokens": 5,'; out_has '"decode_tokens": 24,'
list() { sed "s/.*\"$1\": \[\([^]]*\)\].*/\1/" "$TMP/out"; }
claim "$(list ids | tr ',' '\n' | wc -l)" -eq 24 "ids"
claim "$(list logprobs | tr ',' '\n' | wc -l)" -eq 24 "logprobs"
ids=$(list ids | tr -d ,)
run "text of those ids" 0 "$STORY" --detokenize "$ids"; echo >>"$TMP/out"
same "$TMP/out" "$TMP/greedy" "ids are not the text"
# Scores are exact: a prompt that is read in the same arithmetic gives the same numbers.
run "json, exact" 0 "$STORY" --json -q --exact -t 0 -n 24 "$P"
list logprobs | tr -d ' ' | tr ',' '\n' >"$TMP/logprobs"
ids=$(list ids | tr -d ,)
run "their scores" 0 "$STORY" --score --ids "2 2740 688 266 538 $ids"
name="logprobs are the scores"
tail -25 "$TMP/out" | head -24 | cut -f 2 | paste - "$TMP/logprobs" |
    awk '{ d = $1 - $2; if (d < 0) d = -d; if (d > 1e-5) bad++ } END { exit bad > 0 || NR != 24 }' &&
    pass || fail "they differ: $(tail -25 "$TMP/out" | cut -f 2 | paste - "$TMP/logprobs" | head -3)"
run "json stop string" 0 "$STORY" --json -t 0 -n 24 --stop " a" "$P"
out_has '"finish_reason": "stop_string"'
run "json context" 0 "$STORY" --json -t 0 -C 12 "$P"; out_has '"finish_reason": "context"'
out_has '"decode_tokens": 7,'
if [ "$SYSTEM" != windows ]; then
    run "json control characters" 0 "$STORY" \
        --json -n 0 --echo "$(printf 'a"\\\t\033\302\205\377b')"
    out_has '"text": "a\\"\\\\\\t\\u001b\\u0085\\ufffdb"'
    run "json of overlong, surrogate and too high" 0 "$STORY" --json -n 0 --echo \
        "$(printf '\300\233|\355\240\200|\364\220\200\200')"
    F='\\ufffd'
    out_has "\"text\": \"$F$F|$F$F$F|$F$F$F$F\""
fi

# ---- Logits, score, perplexity -----------------------------------------------------
run "logits" 0 "$STORY" --logits 5 "Once upon a"; err_empty
claim "$(wc -l <"$TMP/out")" -eq 5 "lines"
claim "$(head -1 "$TMP/out" | cut -f 1,3)" = "538	\"▁time\"" "best token"
name="logits descend"; sort -s -t '	' -k 2,2gr "$TMP/out" >"$TMP/want"
same "$TMP/out" "$TMP/want" "they do not"
run "all logits" 0 "$STORY" --logits 2147483647 x; claim "$(wc -l <"$TMP/out")" -eq 4096 "lines"
# A trace: the last layer's state gives the model's best tokens.  A layer in full agrees.
run "logits, exact" 0 "$STORY" --exact --logits 5 "Once upon a"; keep best
run "trace" 0 "$STORY" --trace "Once upon a"; err_empty; keep trace
claim "$(grep -c '^layer [0-5], local\|^layer [0-5], global' "$TMP/out")" -eq 6 "layers"
claim "$(grep -c "	norm [0-9.]*	.* \.\.	" "$TMP/out")" -eq 81 "steps"
claim "$(grep '^best next' "$TMP/out" | tail -1)" = \
    "best next $(cut -f 3 "$TMP/best" | tr '\n' ' ' | sed 's/ $//')" "lens"
claim "$(grep '^best next' "$TMP/out" | sort -u | wc -l)" -gt 3 "different lenses"
claim "$(grep '^geglu' "$TMP/out" | cut -f 1,4 | sort -u)" = "geglu          [4, 768]	402.0 KiB" \
    "bytes and shape"
claim "$(grep '^logits' "$TMP/out" | cut -f 4)" = "1.0 MiB" "bytes of the tied head"
name="the reference pass's trace"
GEMMA2_ISA=reference "$RUN" "$STORY" --trace "Once upon a" </dev/null >"$TMP/out"
grep '^best next\|^logits' "$TMP/out" | cut -f 1-3 >"$TMP/reference"
grep '^best next\|^logits' "$TMP/trace" | cut -f 1-3 >"$TMP/want"
same "$TMP/want" "$TMP/reference" "it is another one"
run "a layer in full" 0 "$STORY" --trace-layer 5 "Once upon a"; err_empty
claim "$(wc -l <"$TMP/out")" -eq 52 "rows of 13 steps"
claim "$(awk '/^geglu.3/ { print NF }' "$TMP/out")" -eq 769 "values"
claim "$(awk '/^residual.3/ { printf "%.5g %.5g\n", $2, $3 }' "$TMP/out")" = \
    "$(grep '^residual' "$TMP/trace" | tail -1 | cut -f 3 | cut -d ' ' -f 1,2)" "the last state"
refuses "6 layers" "a layer that is not there" 2 "$STORY" --trace-layer 6 x
refuses "at most 256" "a trace of a long text" 2 "$STORY" \
    --trace --ids "$(awk 'BEGIN { for (i = 0; i < 300; i++) print 6 }')"
refuses "do not go together" "trace and score" 2 "$STORY" --trace --score x
run "score" 0 "$STORY" --score "$P"; err_empty; claim "$(wc -l <"$TMP/out")" -eq 5 "lines"
claim "$(head -4 "$TMP/out" | cut -f 1 | tr '\n' ' ')" = "2740 688 266 538 " "ids"
name="score total"
awk '$1 == "total" { d = $2 - sum; exit !(d < 1e-6 && d > -1e-6) } { sum += $2 }' "$TMP/out" &&
    pass || fail "total is not the sum"
run "score of nothing" 0 "$STORY" --score ""; out_is "total\t0\n"
refuses "g.gbnf" "a grammar that is not there" 1 "$STORY" -p x --grammar g.gbnf
refuses "belongs to the --json" "top log-probabilities of nothing" 2 "$STORY" x --top-logprobs 2
run "top log-probabilities" 0 "$STORY" -q --json -t 0 -n 2 --top-logprobs 3 "Once upon"; keep tops
claim "$(grep -o '"piece"' "$TMP/tops" | wc -l)" -eq 6 "three candidates for each of two tokens"
for mode in --score "--logits 3" --info --tokenize; do
    run "$mode --json" 0 "$STORY" -q --json $mode ${mode:+$([ "$mode" = --info ] || echo Once)}
done
refuses "last or mean" "a state of no kind" 2 "$STORY" --embed first x
refuses "no head for scores" "scores of a model without" 2 "$STORY" --reward x
run "perplexity" 0 "$STORY" --perplexity "$HERE/demo/README.md" -C 64
out_has "^perplexity	[0-9.]*	+/-	[0-9.]*$"; err_has "^\[1/"
keep perplexity
run "perplexity, quiet" 0 "$STORY" -q --perplexity "$HERE/demo/README.md" --context=64
err_empty; same "$TMP/out" "$TMP/perplexity" "perplexity differs"
name="perplexity by the scores of its chunks"
printf '%s' "$P$P$P$P$P$P$P$P" >"$TMP/file"
run "$name" 0 "$STORY" -q --perplexity "$TMP/file" -C 11; keep perplexity
"$RUN" "$STORY" --tokenize -f "$TMP/file" | tr ' ' '\n' >"$TMP/ids"
claim "$(wc -l <"$TMP/ids")" -eq 33 "tokens: three chunks"
for chunk in 0 1 2; do
    list=$(awk -v at=$((chunk * 11)) 'NR == at + 1 { print 2 } NR > at + 1 && NR <= at + 11' "$TMP/ids")
    "$RUN" "$STORY" --score --ids "$list" | sed -n 6,10p
done >"$TMP/scores"
awk 'FNR == NR { sum += $2; n++; next }
    { d = log($2) + sum / n; exit !(n == 15 && d < 1e-4 && d > -1e-4) }' "$TMP/scores" "$TMP/perplexity" &&
    pass || fail "it is $(cat "$TMP/perplexity")"
refuses "chunks of 17 need 34" "perplexity of a chunk and a half" 2 "$STORY" \
    --perplexity "$TMP/file" -C 17
printf 'Too short.' >"$TMP/file"
refuses "1024" "perplexity of little" 2 "$STORY" --perplexity "$TMP/file"
refuses "3 tokens" "chunks too short" 2 "$STORY" --perplexity "$HERE/demo/README.md" -C 2
refuses "/none" "perplexity of nothing" 1 "$STORY" --perplexity "$TMP/none"

# ---- Importance: header, then f32 for 6 layers' inputs (256, 256, 256, 768) and the head's --
run "importance" 0 "$STORY" --importance "$TMP/imp" -C 16 "$P$P$P$P$P$P"
out_empty; err_has "imp: 25 tokens"; claim "$(wc -c <"$TMP/imp")" -eq 37952 "bytes"
claim "$(od -An -v -td4 -j8 -N44 "$TMP/imp" | tr -s ' \n' ' ')" = \
    " 1 1 6 256 4 2 64 768 4096 0 25 " "header"
run "importance, quiet" 0 "$STORY" -q --importance "$TMP/imp2" -C 16 -j 1 "$P$P$P$P$P$P"
err_empty; same "$TMP/imp" "$TMP/imp2" "importance differs"
run "importance, a chunk" 0 "$STORY" -q --importance "$TMP/imp" -C 25 "$P$P$P$P$P$P"
run "with room for another token" 0 "$STORY" -q --importance "$TMP/imp2" -C 26 "$P$P$P$P$P$P"
same "$TMP/imp" "$TMP/imp2" "importance differs"
run "importance in blocks" 0 "$STORY" -q --importance "$TMP/imp2" --importance-block 32 "$P"
claim "$(wc -c <"$TMP/imp2")" -eq 1212480 "bytes"
refuses "multiple of 32" "block of 48" 2 "$STORY" --importance "$TMP/imp3" --importance-block 48 \
    "$P"
refuses "needs a text" "importance of nothing" 2 "$STORY" --importance "$TMP/imp3" ""
refuses "cannot save the importance as $TMP/none/imp" "importance to nowhere" 1 "$STORY" \
    --importance "$TMP/none/imp" "$P"
name="importance refused"; ls "$TMP" | grep -q imp3 && fail "left a file" || pass

# ---- Pipes, signals, terminals -----------------------------------------------------
name="broken pipe"
{ "$RUN" "$STORY" --logits 4096 x 2>"$TMP/err"; echo $? >"$TMP/status"; } </dev/null |
    head -1 >/dev/null
claim "$(cat "$TMP/status")" -eq 0 "exit status"; err_empty
if [ -w /dev/full ]; then
    name="full disk"
    "$RUN" "$STORY" -n 5 x </dev/null >/dev/full 2>"$TMP/err"
    claim $? -eq 1 "exit status"; err_has "cannot write"
    name="a session on a full disk"
    "$RUN" "$STORY" -n 5 --session "$S" x </dev/null >/dev/full 2>"$TMP/err"
    claim $? -eq 1 "exit status"; same "$S" "$TMP/same" "its file was changed"
fi
name="a session whose reader leaves"
"$RUN" "$STORY" -n 500 --ignore-eos --session "$S" x </dev/null 2>"$TMP/err" | true
same "$S" "$TMP/same" "its file was changed"
name="closed output"
"$RUN" "$STORY" --tokenize x </dev/null >&- 2>"$TMP/err"
claim $? -eq 1 "exit status"; err_has "cannot write"
"$RUN" --version </dev/null >&- 2>"$TMP/err"
claim $? -eq 1 "exit status of --version"; err_has "cannot write"
if timeout --preserve-status 5 true 2>/dev/null; then
    # interrupted SIGNAL FILE ARGUMENT...: sends a signal, later each time until $TMP/FILE shows
    # that run was at work: a busy machine may let it begin late.
    interrupted() {
        number=$1 shows=$2
        shift 2
        for after in 0.3 1 3 10 30 100; do
            timeout --preserve-status -s "$number" $after "$RUN" "$STORY" "$@" \
                </dev/null >"$TMP/out" 2>"$TMP/err"
            status=$?
            [ -s "$TMP/$shows" ] && break
        done
    }
    name="interrupt"
    interrupted INT out -q --json -C 200000 --ignore-eos x
    claim $status -eq 130 "exit status"; out_has '"finish_reason": "interrupted"'
    if [ "$SYSTEM" != windows ]; then
        interrupted TERM out -q --json -C 200000 --ignore-eos x
        claim $status -eq 143 "exit status after SIGTERM"; out_has '"finish_reason": "interrupted"'
    fi
    name="an interrupted session"
    interrupted INT out -q -C 200000 --ignore-eos --session "$S" x
    claim $status -eq 130 "exit status"; same "$S" "$TMP/same" "its file was changed"
    name="interrupt while scoring"
    awk 'BEGIN { for (i = 0; i < 90000; i++) print "Once upon a time" }' >"$TMP/file"
    interrupted INT err --perplexity "$TMP/file"
    claim $status -eq 130 "exit status"; out_empty
else
    echo "not run: interrupts, there is no timeout with --preserve-status"
fi
if [ "$SYSTEM" = posix ]; then # other systems do not map the file, or do not let it shrink
    name="a model that shrinks while it is mapped"
    cp "$STORY" "$TMP/model"
    mkfifo "$TMP/fifo"
    "$RUN" "$TMP/model" -v <"$TMP/fifo" >"$TMP/out" 2>"$TMP/err" &
    pid=$!
    exec 9>"$TMP/fifo"
    await grep -q mapped "$TMP/err"
    : >"$TMP/model"
    echo x >&9
    exec 9>&-
    wait $pid
    claim $? -eq 3 "exit status"; out_empty
    claim "$(grep -c '^run: .* it became shorter' "$TMP/err")" -eq 1 "sentences"
fi
# terminal NAME COMMAND: runs a command on a pseudo-terminal.  No output is a failure if a trial
# showed that the terminal works.  tests/terminal.c tests conversations.
terminal() {
    name=$1
    timeout 200 script -qec "$2" /dev/null </dev/null 2>/dev/null | tr -d '\r' >"$TMP/out"
    [ -s "$TMP/out" ]
}
if [ "$SYSTEM" = windows ]; then
    echo "not run: what a terminal sees of control characters, and arguments that are not UTF-8"
    # The console, which wine shows on a terminal, with sequences between the characters.
    shown() { sed 's/\x1b\[[?0-9]*[A-Za-z]//g' "$TMP/raw" | grep -c "$1"; }
    awaits() { # PATTERN N: waits for N lines like that
        tries=0
        until [ "$(shown "$1")" -ge "$2" ] || [ $tries -gt 400 ]; do
            sleep 0.05
            tries=$((tries + 1))
        done
    }
    name="a conversation on the console"
    : >"$TMP/raw"
    { awaits '^>' 1; printf 'h\303\251\360\237\230\200\\\r'
      awaits '^[.]' 1; printf 'two\r'
      awaits '^>' 2; printf '/exit\r'; awaits '^status' 1; } | timeout 100 script -qec \
        "'$RUN' '$STORY' -q -c --choice ok --session '$TMP/talk'; echo status \$?" /dev/null \
            >"$TMP/raw"
    claim "$(shown '^status 0')" -eq 1 "status 0"
    run "$name" 0 "$STORY" -q -c -n 0 --json --load "$TMP/talk" x
    kept=$(sed 's/.*"prompt_ids": \[\([^]]*\)\].*/\1/' "$TMP/out" | tr -d ,)
    printf 'h\303\251\360\237\230\200\ntwo' >"$TMP/in"
    run "$name" 0 "$STORY" --tokenize -c
    case "$kept " in "$(cat "$TMP/out") "*) pass ;; *) fail "kept $kept" ;; esac
elif terminal "a terminal" "echo x" && [ "$(cat "$TMP/out")" = x ]; then
    terminal "no control sequences" "'$RUN' '$STORY' --detokenize '35 99 6 17 202 163'"
    claim "$(od -An -tx1 <"$TMP/out" | tr -d ' \n')" = efbfbd5b0a09efbfbd "bytes"
    printf %s "$ESCAPES" >"$TMP/file"
    terminal "nor in the echo of a prompt, carriage returns included" \
        "stty -opost; '$RUN' '$STORY' -q -n 0 --echo -f '$TMP/file'"
    R='\357\277\275'
    out_is "a$R]0;b$R$R$R${R}c${R}d\n"
    # ESC, overlong, a surrogate, U+9F.
    printf 'a\300\233\355\240\200\340\200\233\302\237' >"$TMP/file"
    terminal "nor spelled in too many bytes" "'$RUN' '$STORY' -q -n 0 --echo -f '$TMP/file'"
    out_is "a$R$R$R$R$R$R$R$R$R\n"
    terminal "nor in a message" "'$RUN' '$TMP/$ESCAPES' x"
    claim "$(tr -d '\n[:print:]' <"$TMP/out" | wc -c)" -eq 0 "control characters"
    printf 'a\342\200\256b\342\201\251\302\255' >"$TMP/file"
    terminal "marks of direction are text" "'$RUN' '$STORY' -q -n 0 --echo -f '$TMP/file'"
    out_is 'a\342\200\256b\342\201\251\302\255\n'
    terminal "terminal without a prompt" "'$RUN' '$STORY'; echo status \$?"
    out_has "status 2"
    terminal "JSON of a conversation" "'$RUN' '$STORY' -c --json; echo status \$?"
    out_has "put one message after the model file, or leave --json out"; out_has "status 2"
else
    echo "not run: what a terminal sees, there is no script (util-linux)"
fi

# ---- Replies that are constrained ---------------------------------------------------
for seed in 1 2 3; do
    run "choice, seed $seed" 0 "$STORY" -q -s $seed --choice "a cat" --choice dogs Once
    case $(cat "$TMP/out") in "a cat" | dogs) pass ;; *) fail "it chose '$(cat "$TMP/out")'" ;; esac
done
run "choices as JSON" 0 "$STORY" -q --json --choice Yes --choice No Once
out_has '"choices": \[{"text": "Yes", "probability": 0[.][0-9]*}, {"text": "No", "prob'
out_has '"finish_reason": "stop"'
sum=$(sed 's/.*"choices"//; s/"finish.*//' "$TMP/out" | tr ',}' '\n\n' |
      awk '/probability/ {sum += $2} END {printf "%.5f", sum}')
claim "$sum" = 1.00000 "sum of the probabilities"
refuses "-n 1 leaves no room for the shortest reply, which takes 3 tokens" "choice and -n" 2 \
    "$STORY" -n 1 --choice "The dog ran" Once
printf 'root ::= "<" [a-z]{3,} ">"\n' >"$TMP/g"
for n in 5 6 9 30; do
    run "grammar, -n $n" 0 "$STORY" -q -n $n --grammar "$TMP/g" Once
    claim "$(grep -c '^<[a-z]\{3,\}>$' "$TMP/out")" -eq 1 "a whole sentence of the grammar"
done
printf 'root ::= "a"\nb ::= (\n' >"$TMP/g"
refuses "line 2, column 7: this ( is not closed" "open parenthesis" 2 "$STORY" --grammar "$TMP/g" x
awk 'BEGIN {
    printf "x ::= \"a\""
    while (i++ < 1100) printf " | \"a\""
    printf "\nroot ::= x"
    while (j++ < 1100) printf " | x \"b\""
}' >"$TMP/many"
run "an ambiguous grammar" 1 "$STORY" -q --grammar "$TMP/many" x
err_has "can go on in more ways than memory is kept for"
refuses "do not go together" "choice and grammar" 2 "$STORY" --choice a --grammar "$TMP/g" x
refuses "do not go together" "choice without end" 2 "$STORY" --choice a --ignore-eos x
[ "$SYSTEM" = windows ] ||
    refuses "this is not UTF-8" "choice with a stray byte" 2 "$STORY" --choice "$(printf 'a\377b')" x
printf '{"prompt": "Once", "choices": ["a cat", "a dog"]}\n' >"$TMP/in"
run "choices of a line" 0 "$STORY" -q --batch -
out_has '"text": "a \(cat\|dog\)", "finish_reason": "stop"'

cat >"$TMP/s" <<'END'
{"type": "object", "required": ["name"], "properties": {"name": {"type": "string",
 "maxLength": 8}, "age": {"type": "integer", "minimum": 7, "maximum": 123}}}
END
for n in 16 30 60; do
    run "schema, -n $n" 0 "$STORY" -q -n $n --schema "$TMP/s" Once
    claim "$(grep -cE '^[{]"name":".*"(,"age":([7-9]|[1-9][0-9]|1[01][0-9]|12[0-3]))?[}]$' \
             "$TMP/out")" -eq 1 "JSON that fits"
done
printf '{"pattern": "^([A-C]|\\\\d{2})+x?$"}' >"$TMP/s"
run "pattern" 0 "$STORY" -q -n 9 --schema "$TMP/s" Once
claim "$(grep -cE '^"([A-C]|[0-9]{2})+x?"$' "$TMP/out")" -eq 1 "a string that fits the pattern"
schema() { printf "$1" >"$TMP/s"; refuses "$2" "schema $1" 2 "$STORY" --schema "$TMP/s" x; }
schema '{"properties": {"a": {"not": {}}}}' "#/properties/a/not: the keyword 'not' is not known"
schema '{"type": "integer", "minimum": 5, "maximum": 3}' "#: no number of at most 15 digits lies between"
schema '{"$ref": "#/none"}' '#/$ref: this $ref leads to nothing'
schema '{"$ref": "#"}' "#: it leads back to itself"
schema '{"allOf": [{"type": "string"}, {"type": "null"}]}' "no value fits the schema"
schema '{"type": "string", "minlength": 3}' "#/minlength: the keyword 'minlength' is not known"
schema '{"prefixItems": 5}' "#/prefixItems: 'prefixItems' must be a list"
schema '{"uniqueItems": true}' "#/uniqueItems: 'uniqueItems' must be false"
schema '{"type": "number", "maximum": 1.5}' "#: the bounds of a number must be whole"
schema '{"pattern": "a", "maxLength": 3}' "#/pattern: two of 'pattern', 'format' and a"
schema '{"pattern": "[é]"}' "#/pattern: 'pattern' has something unknown just before byte 2"
schema '{"properties": {"a": {}}, "patternProperties": {"b": {}}}' \
    "#/patternProperties: named keys do not go with 'patternProperties'"
schema '{"patternProperties": {"a": {}, "b": {}}}' "may have only one pattern"
schema '{"minItems": 1, "items": {"enum": []}}' "no value fits the schema"
schema '{"enum": ["a"], "minLength": 2}' \
    "#/enum/0: no keyword but 'type' may constrain this listed value"
schema '{"allOf": [{"pattern": "a"}, {"pattern": "b"}]}' "#/allOf/1/pattern: two of 'pattern'"
schema '{"type": ["object", "any"]}' "#/type: 'type' must be one, or a list, of string, integer"
schema '{"oneOf": [{"type": "null"}, {"const": null}]}' "#/oneOf/1: a value may fit this way"
way='{"required": ["k"], "properties": {"k": {"const": '
schema "{\"oneOf\": [$way 1}}}, $way 1}}}]}" "#/oneOf/1: a value may fit this way"
schema "{\"type\": [\"object\", \"string\"], \"oneOf\": [$way 1}}}, $way 2}}}]}" \
    "#/oneOf/1: a value may fit this way" # a string fits both
schema '{"$ref": "#/properties/a", "properties": {}}' '#/$ref: this $ref leads to nothing: it is #'
schema '{"$ref": "#/$defs/a~1b", "$defs": {"a": {}, "a~1b": {}}}' "leads to nothing"
schema '{"$ref": "#/$defs", "$defs": 5}' "a schema is an object, true or false"
schema '{"items": {"enum": [[1], 2]}}' "#/items/enum: a listed value must not be an array or object"
schema '{"const": {}}' "#/const: 'const' must be no array or object"
schema '{"minLength": 2001}' "#: no string of a size up to 2000 lies between"
schema '{"minItems": 3, "maxItems": 2}' "#: no array of a size up to 2000 lies between"
schema '{"minProperties": 2, "properties": {"a": {}, "b": {}, "c": {}}}' "'minProperties' may be at most 1"
schema '{"allOf": [[{}]]}' "#/allOf/0: a schema is an object, true or false"
schema "{\"oneOf\": [$way 1}}, \"type\": \"object\"}, {\"patternProperties\": {\"k\": {}}, \"type\":
\"object\", \"additionalProperties\": false}]}" "#/oneOf/1: a value may fit this way" # the key fits both
schema '{"pattern": "a\\\\b"}' "#/pattern: 'pattern' has something unknown just before byte 3"
schema '{"type": "number", "minimum": 5, "maximum": 3}' "#: no number of at most 15 digits lies between"
schema '{"format": "ipv6"}' "#/format: only the formats date time date-time"
schema '{"a":' "line 1, column 6"
schema '{"é": tru}' "line 1, column 7"
printf '{"prompt": "Once", "schema": {"enum": [true, "x"]}}\n' >"$TMP/in"
run "schema of a line" 0 "$STORY" -q --batch -
out_has '"text": "\(true\|\\"x\\"\)", "finish_reason": "stop"'

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
