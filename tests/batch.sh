#!/bin/sh
# run --batch, from outside: sh tests/batch.sh [./run]
# Needs POSIX sh and the demo model.  Prints what fails, then "N passed, N failed".
. "$(dirname "$0")/start.sh"

claim() { if [ "$1" "$2" "$3" ]; then passed=$((passed + 1)); else
    failed=$((failed + 1)); echo "FAIL $4: got '$1', expected $2 '$3'"; fi; }
same() { cmp -s "$1" "$2"; claim $? -eq 0 "$3"; }
batch() { "$RUN" "$STORY" --batch "$@" 2>"$TMP/err"; }

# ---- The same bits as alone, in any batch, order and number of threads -------------------
long='Once upon a time there was a king who had three daughters, and the youngest was so good that'
for i in 1 2 3 4 5; do long="$long $long"; [ ${#long} -gt 1600 ] && break; done
: >"$TMP/in"; : >"$TMP/alone"
n=0
# line JSON ARGUMENT...: adds a line, and run's answer to the same.  PROMPT is the prompt of both.
line() {
    members=$1
    shift
    n=$((n + 1))
    printf '{"prompt": "%s", %s}\n' "$PROMPT" "$members" >>"$TMP/in"
    "$RUN" "$STORY" --json -q -j 1 -s 7 "$@" -p "$PROMPT" |
        sed 's/^{"text": "\(.*\)", "prompt_ids": .*, "ids": \(\[.*\]\), "finish_reason": \(.*\), "timings.*/'$n' "\1", \3, \2/' >>"$TMP/alone"
}
# Result lines in the form of $TMP/alone, in the order of their numbers.
results() {
    sed 's/^{"id": \([0-9]*\), "text": \(".*"\), "finish_reason": \(.*\), "usage": {[^}]*}, "ids": \(.*\)}$/\1 \2, \3, \4/' |
        sort -n
}
many='a choice that takes more tokens than the room of a short reply'
printf '{"enum": [1, "x y"]}' >"$TMP/schema"
printf 'root ::= [a-e]{9}' >"$TMP/grammar"
for GEMMA2_ISA in '' avx512 scalar; do
    [ -n "$GEMMA2_ISA" ] && export GEMMA2_ISA || unset GEMMA2_ISA
    "$RUN" "$STORY" --info >/dev/null 2>&1 || continue
    : >"$TMP/in"; : >"$TMP/alone"; n=0
    PROMPT='Once upon a time';     line '"max_tokens": 25' -n 25
    PROMPT="$long the end";        line '"max_tokens": 9, "temperature": 0' -n 9 -t 0
    PROMPT="$long he";             line '"max_tokens": 12, "seed": 3' -n 12 -s 3
    PROMPT='';                     line '"max_tokens": 6' -n 6
    PROMPT='The wolf';             line '"max_tokens": 30, "stop": [" the", "q"]' -n 30 \
        --stop ' the' --stop q
    PROMPT="$long the";            line '"max_tokens": 7, "top_k": 5, "top_p": 0.5' -n 7 -k 5 -P 0.5
    PROMPT='A';                    line '"max_tokens": 15, "min_p": 0.2, "presence_penalty": 1.5' \
        -n 15 --min-p 0.2 --presence-penalty 1.5
    PROMPT='Nothing';              line '"max_tokens": 0' -n 0
    PROMPT="$long";                line '"max_tokens": 5, "temperature": 1.7' -n 5 -t 1.7
    PROMPT='The old woman'
    line '"max_tokens": 20, "repetition_penalty": 1.3' -n 20 --repeat-penalty 1.3
    PROMPT='Is it?';               line '"max_tokens": 9, "choices": ["yes", "no"]' -n 9 \
        --choice yes --choice no
    PROMPT='So';                   line '"max_tokens": 1, "choices": ["'"$many"'", "a"]' -n 1 \
        --choice "$many" --choice a
    PROMPT='The fox';              line '"max_tokens": 30, "schema": {"enum": [1, "x y"]}' -n 30 \
        --schema "$TMP/schema"
    [ "$GEMMA2_ISA" = scalar ] && set -- '8 1' || set -- '1 1' '3 2' '16 1'
    for how; do
        batch "$TMP/in" --json -s 7 --parallel ${how% *} -j ${how#* } | results >"$TMP/got"
        same "$TMP/alone" "$TMP/got" "the results of $how (parallel, threads) on '$GEMMA2_ISA'"
        claim "$(wc -l <"$TMP/got")" -eq 13 "lines"
    done
done
unset GEMMA2_ISA
batch "$TMP/in" --json -s 7 --kv f32 --exact --parallel 4 | results >"$TMP/got"
"$RUN" "$STORY" --json -q --kv f32 --exact -s 7 -n 9 -t 0 -p "$long the end" |
    sed 's/.*"ids": \(.*\), "finish.*/\1/' >"$TMP/alone"
sed -n '2s/.*7, \(\[.*\)/\1/p' "$TMP/got" >"$TMP/second"
same "$TMP/alone" "$TMP/second" "f32 cache, exact prompts"

# Options are the defaults of lines.
: >"$TMP/in"; : >"$TMP/alone"; n=0
grammar="--grammar $TMP/grammar --top-logprobs 3"
PROMPT='The fox'; line '"max_tokens": 15' -n 15 $grammar
PROMPT='The fox'; line '"max_tokens": 9, "choices": ["a", "b"]' -n 9 --choice a --choice b \
    --top-logprobs 3
PROMPT='The cow'; line '"temperature": 0' -t 0 $grammar
batch "$TMP/in" --json -s 7 --parallel 1 $grammar | results >"$TMP/got"
same "$TMP/alone" "$TMP/got" "--grammar and --top-logprobs of a batch"
: >"$TMP/in"; : >"$TMP/alone"; n=0
PROMPT='The fox'; line '"max_tokens": 15' -n 15 --choice ' is' --choice ' was'
PROMPT='The fox'; line '"max_tokens": 15, "choices": ["a"]' -n 15 --choice a
batch "$TMP/in" --json -s 7 --choice ' is' --choice ' was' | results >"$TMP/got"
same "$TMP/alone" "$TMP/got" "--choice of a batch"
batch "$TMP/in" --schema "$TMP/grammar" >"$TMP/got"; claim $? -eq 2 "exit status of a bad schema"

# A conversation gives what -c -S gives, and a common beginning is read once.
printf '{"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}], "max_tokens": 9}\n' >"$TMP/in"
batch "$TMP/in" -s 2 --json | results | sed 's/^1 \(".*"\), "length".*/\1/' >"$TMP/got"
"$RUN" "$STORY" -q --json -c -S Rhyme. -s 2 -n 9 Hi |
    sed 's/^{"text": \(".*"\), "prompt_ids.*/\1/' >"$TMP/alone"
same "$TMP/alone" "$TMP/got" "messages"
cat >"$TMP/in" <<'END'
{"messages": [{"role": "developer", "content": [{"type": "text", "text": "Rhy"}, {"text": "me.", "type": "text"}]}, {"content": [{"type": "text", "text": "Hi"}], "role": "user"}], "max_tokens": 9}
END
batch "$TMP/in" -s 2 --json | results | sed 's/^1 \(".*"\), "length".*/\1/' >"$TMP/got"
same "$TMP/alone" "$TMP/got" "messages of a developer, and in parts"
# A byte-order mark is no part of the first line, and a key that is null is as good as absent.
printf '\357\273\277{"prompt": null, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}\n' >"$TMP/in"
batch "$TMP/in" -s 2 --json -S Rhyme. | results | sed 's/^1 \(".*"\), "length".*/\1/' >"$TMP/got"
same "$TMP/alone" "$TMP/got" "messages, with the system text of the options"
for i in 1 2 3 4 5 6; do printf '{"prompt": "%s %s", "max_tokens": 3}\n' "$long" $i; done >"$TMP/in"
batch "$TMP/in" --exact >/dev/null
shared=$(sed -n 's/.* and \([0-9]*\) shared.*/\1/p' "$TMP/err")
read=$(sed -n 's/.*prompts \([0-9]*\) tok.*/\1/p' "$TMP/err")
claim "$shared" -gt $((4 * read)) "tokens shared, $read read"
grep -q "^batch: at most [0-9]* sessions" "$TMP/err"; claim $? -eq 0 "the plan of memory"

# ---- Bad lines: each an error of its own --------------------------------------------------
bad() { # SAID LINE
    printf "$2\n" >"$TMP/in"
    batch "$TMP/in" -n 1 -q >"$TMP/got"
    claim $? -eq 1 "exit status after $2"
    if grep -qF -- "$1" "$TMP/got"; then passed=$((passed + 1)); else
        failed=$((failed + 1)); echo "FAIL $2: no '$1' in $(head -c 300 "$TMP/got")"; fi
    claim "$(grep -c '"error": {"message' "$TMP/got")" -eq 1 "errors of $2"
}
bad 'no JSON: at byte 1' 'hello'
bad 'it ends too early' '[1,'
bad 'the line must be an object' '[{"prompt": "a"}]'
bad 'either' '{}'
bad 'either' '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}'
bad 'prompt\" must be a text' '{"prompt": 5}'
bad 'there is no key \"promt\"' '{"promt": "a"}'
bad 'message 1 needs' '{"messages": [{"role": "bot", "content": "a"}]}'
bad 'message 1 needs' '{"messages": [{"role": "user", "content": 5}]}'
bad "part 2 of its \\\"content\\\" has the type 'image_url'" \
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}'
bad 'message 2 needs' '{"messages": [{"role": "user", "content": "a"}, 7]}'
bad 'must be a list of messages' '{"messages": {}}'
bad 'a number from 0 to 1000000' '{"prompt": "a", "temperature": -1}'
bad 'a number from 0 to 1000000' '{"prompt": "a", "temperature": "1"}'
bad 'a whole number' '{"prompt": "a", "max_tokens": 1.5}'
bad 'a number above 0, at most 1' '{"prompt": "a", "top_p": 2}'
bad 'a whole number' '{"prompt": "a", "seed": 18446744073709551616}'
bad 'not empty' '{"prompt": "a", "stop": ["x", ""]}'
bad 'not empty' '{"prompt": "a", "stop": "a\\u0000b"}'
bad 'surrogate' '{"prompt": "\\ud800"}'
bad 'control character' '{"prompt": "a\tb"}'
bad 'valid UTF-8' '{"prompt": "\377"}'
bad 'stands twice' '{"prompt": "a", "prompt": "b"}'
bad 'must be a text or a whole number' '{"id": [1], "prompt": "a"}'
bad 'must be a text or a whole number' '{"id": 1.5, "prompt": "a"}'
bad 'an earlier line has the same id' '{"id": "\\u0061", "prompt": "a"}\n{"id": "a", "prompt": "b"}'
bad '"status_code": 400' '{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}'
bad 'must be POST' '{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {"prompt": "a"}}'
bad 'must be false' '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "stream": true}}'
bad 'must be 1' '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "n": 2}}'
bad 'must be a text' '{"custom_id": 5, "url": "/v1/completions", "body": {"prompt": "a"}}'
bad '"top_logprobs\" belongs' \
    '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "top_logprobs": 2}}'
bad 'must be true or false' \
    '{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}], "logprobs": 2}}'
bad 'logprobs\" takes a whole number' \
    '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "logprobs": true}}'
bad 'from 0 to 1000' '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "logprobs": 1001}}'
bad 'json_object' '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "response_format": {"type": "xml"}}}'
bad 'takes a list of texts' '{"prompt": "a", "choices": []}'
bad 'do not go together' '{"prompt": "a", "choices": ["a"], "schema": true}'
bad '"schema\": ' '{"prompt": "a", "schema": {"type": "x"}}'
bad '"id": 1, "error"' '{"id": {}, "prompt": "a"}'
bad '"body\" must hold' '{"custom_id": "a", "url": "/v1/chat/completions", "body": []}'
printf '{"prompt": "a", "choices": ["a"]}\n' >"$TMP/in"
batch "$TMP/in" --ignore-eos -q | grep -q 'ignore-eos do not go together'
claim $? -eq 0 "an end that is ignored"
{ head -c 100000 /dev/zero | tr '\0' '['; echo; head -c 1000 /dev/zero; echo
  printf '{"id": "'; head -c 1000000 /dev/zero | tr '\0' 'i'; printf '", "prompt": "a"}\n\n  \n'
  printf '{"id": "last", "prompt": "a"}'; } >"$TMP/in"
batch "$TMP/in" -n 1 -q >"$TMP/got"
claim $? -eq 1 "exit status"
claim "$(grep -c '"error"' "$TMP/got")" -eq 2 "errors: deep brackets, zeros"
claim "$(grep -c '"text"' "$TMP/got")" -eq 2 \
    "results: an id of a megabyte, a last line without newline"
claim "$(wc -c <"$TMP/got")" -gt 1000000 "bytes"
awk 'BEGIN { for (i = 0; i < 1100; i++) printf "word "; }' >"$TMP/words"
printf '{"prompt": "%s"}\n' "$(cat "$TMP/words")" >"$TMP/in"
batch "$TMP/in" -q | grep -q 'the context holds 1024'
claim $? -eq 0 "a prompt longer than the context"

# ---- OpenAI's form -------------------------------------------------------------------------
cat >"$TMP/in" <<'END'
{"custom_id": "c\"1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 4, "logprobs": true, "temperature": null, "response_format": {"type": "text"}}}
{"custom_id": "c2", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "Once upon", "max_tokens": 4}}
END
batch "$TMP/in" -q -s 1 >"$TMP/got"; claim $? -eq 0 "exit status of OpenAI's form"
for part in '"custom_id": "c\\"1", "response": {"status_code": 200' '"object": "chat.completion"' \
    '"message": {"role": "assistant", "content": "' '"finish_reason": "length"' \
        '"total_tokens": 18' \
    '"logprobs": {"content": \[{"token": "' '"object": "text_completion"' '"error": null}$'; do
    claim "$(grep -c "$part" "$TMP/got")" -ge 1 "lines with $part"
done

# Log-probabilities are those of --json --top-logprobs.
cat >"$TMP/in" <<'END'
{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "logprobs": true, "top_logprobs": 2}}
{"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Once \u4e16 upon", "max_tokens": 20, "logprobs": 1, "temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "世a"}}}}}
{"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 9, "response_format": {"type": "json_object"}}}
END
batch "$TMP/in" -q -s 1 >"$TMP/got"; claim $? -eq 0 "exit status of log-probabilities"
"$RUN" "$STORY" -q --json --top-logprobs 2 -s 1 -n 2 -c Hi | sed 's/.*"logprobs": //' |
    grep -o '"logprob": [-0-9.e]*' >"$TMP/want"
grep '"a"' "$TMP/got" | grep -o '"top_logprobs": \[[^]]*\], "logprob[^]]*\]\|{"token[^]]*\]}' |
    grep -o '"logprob": [-0-9.e]*' >"$TMP/tops"
claim "$(wc -l <"$TMP/want")" -eq 4 "others of two tokens"
claim "$(grep -cFxf "$TMP/want" "$TMP/tops")" -ge 4 "others of a chat with run's log-probabilities"
claim "$(grep -c '"tokens": \["\\"", "bytes:\\\\xe4", "bytes:\\\\xb8", "bytes:\\\\x96", "a", "\\""\]' "$TMP/got")" -eq 1 "bytes"
claim "$(grep -c '"text_offset": \[0, 1, 1, 1, 2, 3\]' "$TMP/got")" -eq 1 "offsets in characters"
claim "$(grep -c '"text": "{.*"finish_reason": "stop"' "$TMP/got")" -eq 1 "objects"

# ---- Killed, and begun again -----------------------------------------------------------------
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
    printf '{"id": "%s", "prompt": "The %s", "max_tokens": 60}\n' $i $i
done >"$TMP/in"
echo '{"id": "bad", "prompt": 5}' >>"$TMP/in"
batch "$TMP/in" -q -s 5 -o "$TMP/whole"; claim $? -eq 1 "exit status of one run"
sort "$TMP/whole" >"$TMP/want"
# lines FILE N: whether the file has as many.
lines() { [ "$(wc -l 2>/dev/null <"$1" || echo 0)" -ge "$2" ]; }
# killed SIGNAL: ends a run after its second result, and leaves its status in $status.  It cannot
# end before: it waits for the last lines.
mkfifo "$TMP/fifo"
killed() {
    rm -f "$TMP/out"
    "$RUN" "$STORY" --batch - -q -s 5 -j 1 --parallel 2 -o "$TMP/out" <"$TMP/fifo" 2>"$TMP/err" &
    pid=$!
    exec 9>"$TMP/fifo"
    head -n 9 "$TMP/in" >&9
    await lines "$TMP/out" 2
    kill -$1 $pid
    exec 9>&-
    wait $pid
    status=$?
}
killed KILL 2>/dev/null
printf '{"id": "7", "text": "To' >>"$TMP/out" # a torn line
batch "$TMP/in" -s 5 --parallel 3 -o "$TMP/out"; claim $? -eq 1 "exit status of the second run"
sort "$TMP/out" >"$TMP/got"; same "$TMP/want" "$TMP/got" "results after kill -9"
claim "$(sed -n 's/.* \([0-9]*\) done before.*/\1/p' "$TMP/err")" -ge 2 \
    "results of the first run that were kept"
batch "$TMP/in" -q -s 5 -o "$TMP/out"
sort "$TMP/out" >"$TMP/got"; same "$TMP/want" "$TMP/got" "the same command once more"
killed TERM 2>/dev/null
claim $status -eq 143 "exit status after SIGTERM"
claim "$(grep -c '^{"id": .*}}$' "$TMP/out")" -eq "$(wc -l <"$TMP/out")" "whole lines after SIGTERM"
batch "$TMP/in" -q -s 5 -o "$TMP/out"
sort "$TMP/out" >"$TMP/got"; same "$TMP/want" "$TMP/got" "results after SIGTERM"

# Without -s the second run takes the seed that the first run drew, even if lines have their own.
for i in 1 2 3 4 5; do
    printf '{"id": %s, "prompt": "The %s", "max_tokens": 5%s}\n' $i $i \
        "$([ $i -lt 4 ] && echo ', "seed": 8')"
done >"$TMP/seeds"
"$RUN" "$STORY" --batch "$TMP/seeds" -q -o "$TMP/whole"
sort "$TMP/whole" >"$TMP/want"; grep -v '"id": [15]' "$TMP/whole" >"$TMP/out"
batch "$TMP/seeds" -q -o "$TMP/out"
sort "$TMP/out" >"$TMP/got"; same "$TMP/want" "$TMP/got" "results with a seed that was drawn"
sed -n 1,4p "$TMP/whole" >"$TMP/out"
batch - -q -o "$TMP/out" <"$TMP/seeds"; claim $? -eq 2 "exit status where that seed cannot be found"
grep -q 'give its seed with --seed' "$TMP/err"; claim $? -eq 0 "the way out"
# An output file that holds anything but results stays as it is.
cp "$TMP/seeds" "$TMP/out"
batch "$TMP/seeds" -q -o "$TMP/out"; claim $? -eq 2 "exit status where OUT holds no results"
same "$TMP/seeds" "$TMP/out" "OUT that holds no results"

# ---- Streams -----------------------------------------------------------------------------
if [ -w /dev/full ]; then
    batch "$TMP/in" -q -s 5 >/dev/full; claim $? -eq 1 "exit status on a full disk"
    claim "$(grep -c 'cannot write to standard output: No space' "$TMP/err")" -eq 1 "sentences"
fi
{ batch "$TMP/in" -q -s 5; echo $? >"$TMP/status"; } | head -n 1 >"$TMP/got"
claim "$(cat "$TMP/status")" -eq 0 "exit status when the reader leaves"
sed 1d "$TMP/in" | batch - -q -s 5 >"$TMP/got"
claim "$(wc -l <"$TMP/got")" -eq 12 "results of standard input"
: >"$TMP/got"
# A program may wait for each result before it sends the next line.
{ for i in 1 2; do
    printf '{"prompt": "a", "max_tokens": 1}\n'
    await lines "$TMP/got" $i
    wc -l <"$TMP/got" >>"$TMP/counts"
  done; } | batch - -q >"$TMP/got"
claim "$(tr -d '\n ' <"$TMP/counts")" = 12 "results in time"
batch "$TMP/none" >/dev/null; claim $? -eq 1 "exit status without a file"
batch "$TMP/in" --parallel 0 >/dev/null; claim $? -eq 2 "exit status of --parallel 0"
: >"$TMP/in"; batch "$TMP/in" -q >"$TMP/got"; claim $? -eq 0 "exit status of no lines"

# ---- README's recipes for many machines, with this test's names ---------------------------
README=$(dirname "$0")/../README.md
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    printf '{"id": "%d", "prompt": "A fox and %d", "max_tokens": 5}\n' $i $i
done >"$TMP/in.jsonl"
batch "$TMP/in.jsonl" -q -s 1 | sort >"$TMP/want"
recipe() { # ADDRESS: these lines of README, run in $TMP
    sed -n "$1p" "$README" |
        sed "s|\./run model.bin|'$HERE_RUN' '$HERE_STORY'|g; s/-N 1000/-N 3/" >"$TMP/recipe"
    (cd "$TMP" && PATH=$TMP:$PATH && . ./recipe) >/dev/null 2>"$TMP/err"
}
HERE_RUN=$(cd "$(dirname "$RUN")" && pwd)/$(basename "$RUN")
HERE_STORY=$(cd "$(dirname "$STORY")" && pwd)/story-q8.bin
if parallel --version 2>/dev/null | grep -q GNU; then
    recipe '/^parallel /'
    sort "$TMP/out.jsonl" >"$TMP/got"; same "$TMP/want" "$TMP/got" "GNU parallel"
else
    echo "not run: GNU parallel: there is no parallel"
fi
# A dry run of Slurm: an sbatch that runs the tasks of its array one after another.
cat >"$TMP/sbatch" <<'END'
#!/bin/sh
last=${1#--array=0-}
i=0
while [ $i -le "$last" ]; do SLURM_ARRAY_TASK_ID=$i sh -c "$3" || exit 1; i=$((i + 1)); done
END
chmod +x "$TMP/sbatch"
recipe '/^split /,/--wrap/'
cat "$TMP"/out.[0-9] 2>/dev/null | sort >"$TMP/got"; same "$TMP/want" "$TMP/got" "a Slurm array"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
