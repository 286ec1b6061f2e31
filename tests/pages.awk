# The manual page and the shells' completions, made of the program's own --help:
#   gemma2 --help | awk -v form=man|bash|zsh|fish -v version=0.1.0 -f tests/pages.awk
# A line that begins at the left is a heading or, with a full stop, the introduction.  An option
# is "  -x, --name ARGUMENT", with its help from column 28 on, also on the next lines.
/^usage: / { name = $2; next }
/^[^ ]/ { add("heading", $0); next }
/^  (-[A-Za-z],|   ) --/ {
    add("option", substr($0, 28))
    letter[n] = substr($0, 4, 1)
    if (letter[n] == " ") letter[n] = ""
    long[n] = substr($0, 9)
    sub(/ .*/, "", long[n])
    argument[n] = substr($0, 10 + length(long[n]), 18 - length(long[n]))
    sub(/ +$/, "", argument[n])
    next
}
NF && kind[n] == "option" { sub(/^ +/, ""); text[n] = text[n] (text[n] == "" ? "" : " ") $0; next }
NF { add("text", substr($0, 3)) }
END {
    if (form == "man") man()
    else if (form == "bash") bash()
    else if (form == "zsh") zsh()
    else fish()
}

function add(what, line) { kind[++n] = what; text[n] = line }
function files(i) { return argument[i] == "FILE" || argument[i] == "OUT" }
function words(i, list) { # of a choice, as in "f32|f16"
    list = argument[i]
    return gsub(/[|]/, " ", list) ? list : ""
}

function roff(s) {
    gsub(/\\/, "\\e", s)
    gsub(/-/, "\\-", s)
    return (s ~ /^[.']/ ? "\\&" : "") s
}
function fill(on) { if (on == plain) print (on ? ".fi" : ".nf"); plain = !on }
function man(i, options) {
    printf ".TH \"%s\" 1 \"\" \"gemma2.c %s\" \"User Commands\"\n", name, version
    printf ".SH NAME\n%s \\- run Gemma 2 language models\n.SH SYNOPSIS\n", name
    printf "\\fB%s\\fR \\fIMODEL\\fR [\\fIoptions\\fR] [\\fIPROMPT\\fR]\n.SH DESCRIPTION\n", name
    for (i = 1; i <= n; i++) {
        if (kind[i] == "text" || text[i] ~ /[.]$/ && kind[i] == "heading") {
            print roff(text[i])
        } else if (kind[i] == "heading") {
            fill(1)
            if (kind[i + 1] == "option" && !options++) print ".SH OPTIONS"
            if (kind[i + 1] == "option") printf ".SS \"%s\"\n", text[i]
            else printf ".SH \"%s\"\n", toupper(text[i])
            if (text[i] == "Examples") fill(0)
        } else {
            print ".TP"
            if (letter[i] != "") printf "\\fB\\-%s\\fR, ", letter[i]
            printf "\\fB%s\\fR", roff("--" long[i])
            if (argument[i] != "") printf " \\fI%s\\fR", roff(argument[i])
            printf "\n%s\n", roff(text[i])
        }
    }
}

function bash(i, list) {
    list = "local IFS=$'\\n'; COMPREPLY=($(compgen -f -- \"$word\"));"
    printf "_%s() {\n    local word=${COMP_WORDS[COMP_CWORD]}\n", name
    print "    local before=${COMP_WORDS[COMP_CWORD-1]}\n    COMPREPLY=()"
    print "    [[ $word == = ]] && word=" # --name=value comes as three words
    print "    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}\n    case $before in"
    for (i = 1; i <= n; i++) {
        if (argument[i] == "") continue
        printf "    --%s%s) ", long[i], letter[i] == "" ? "" : "|-" letter[i]
        if (words(i) != "") printf "COMPREPLY=($(compgen -W '%s' -- \"$word\")); ", words(i)
        else if (files(i)) printf "%s ", list
        print "return ;;"
    }
    printf "    esac\n    case $word in\n    -*) COMPREPLY=($(compgen -W '"
    for (i = 1; i <= n; i++)
        if (kind[i] == "option") printf " --%s", long[i]
    printf "' -- \"$word\")) ;;\n    *) %s ;;\n    esac\n}\n", list
    printf "complete -o filenames -F _%s %s\n", name, name
}

# Inside single quotes; characters of the set get a backslash.
function quoted(s, set) { gsub("[" set "]", "\\\\&", s); gsub(/'/, "'\\''", s); return s }
function zsh(i, value) {
    printf "#compdef %s\n_arguments", name
    for (i = 1; i <= n; i++) {
        if (kind[i] != "option") continue
        value = argument[i] == "" ? "" : "="
        if (letter[i] == "")
            printf " \\\n  '%s--%s%s[", text[i] ~ /may be repeated/ ? "*" : "", long[i], value
        else
            printf " \\\n  '(-%s --%s)'{-%s%s,--%s%s}'[", letter[i], long[i], letter[i],
                value == "" ? "" : "+", long[i], value
        printf "%s]", quoted(text[i], "][\\\\")
        if (value != "") printf ":%s:", quoted(argument[i], ":\\\\")
        if (words(i) != "") printf "(%s)", words(i)
        else if (value != "") printf files(i) ? "_files" : " "
        printf "'"
    }
    print " \\\n  '1:MODEL:_files' '2:PROMPT: '"
}

function fish(i, s) {
    for (i = 1; i <= n; i++) {
        if (kind[i] != "option") continue
        s = text[i]
        gsub(/['\\]/, "\\\\&", s)
        printf "complete -c %s%s -l %s", name, letter[i] == "" ? "" : " -s " letter[i], long[i]
        printf argument[i] == "" ? "" : files(i) ? " -r -F" : " -x"
        printf words(i) == "" ? "" : " -a '" words(i) "'"
        printf " -d '%s'\n", s
    }
}
