#!/usr/bin/env bash
# Runs on every machine of a slice: tools/tpu.py calls it through ssh. It keeps one training alive
# without a terminal, and says how it is.
#
#   host.sh install DIGEST       environment for the source tree that this file lies in
#   host.sh mount BUCKET FOLDER  gcsfuse
#   host.sh start TOKEN COMMAND  in the background; nothing if it runs, or TOKEN was started before
#   host.sh status               one line: WEBSSL host state exit-code digest-of-the-command
#   host.sh stop TERM|KILL       TERM lets it save
#   host.sh logs LINES           the end of its log
set -euo pipefail
source_tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
job=$HOME/webssl_job
name=${WEBSSL_HOST:-$(hostname)}
boot=$(cat /proc/sys/kernel/random/boot_id)

alive() {
    [ ! -f "$job/exit" ] && [ -f "$job/pid" ] && [ "$(cat "$job/boot")" = "$boot" ] &&
        grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$(cat "$job/pid")/status" # a zombie is dead
}

ended() { # with this exit code, for readers at any moment
    echo "$1" > "$job/exit.new"
    mv "$job/exit.new" "$job/exit"
}

report() {
    local state=absent code=- digest=-
    if [ -f "$job/token" ]; then
        digest=$(md5sum < "$job/command" | cut -c1-12)
        if alive; then # asked first: between two looks it may end, and an end is written before it
            state=running
        elif [ -f "$job/exit" ]; then
            state=exited code=$(cat "$job/exit")
        else
            state=lost # the machine was started anew, or somebody killed everything
        fi
    fi
    echo "WEBSSL $name $state $code $digest"
}

case ${1:-} in
install)
    if alive; then
        echo "WEBSSL $name busy - -"
        exit 0
    fi
    if [ "$(cat "$HOME/webssl_venv/.installed" 2>/dev/null)" != "$2" ]; then
        # The images of Cloud TPU have an older Python than the package asks for; uv brings one.
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
        [ -x "$HOME/webssl_venv/bin/python" ] ||
            python3 -m uv venv --quiet --python 3.11 "$HOME/webssl_venv"
        (cd "$source_tree" && VIRTUAL_ENV=$HOME/webssl_venv python3 -m uv pip install --quiet \
            --constraint tools/constraints.txt '.[tpu,gcp]')
        echo "$2" > "$HOME/webssl_venv/.installed"
    fi
    echo "WEBSSL $name installed - $2"
    ;;
mount)
    if ! mountpoint --quiet "$3"; then
        sudo mkdir -p "$3"
        sudo chown "$(id -u)" "$3"
        # Other machines' files must be seen at once; a checkpoint is a folder that is renamed.
        gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=1000000 "$2" "$3"
    fi
    echo "WEBSSL $name mounted - -"
    ;;
start)
    mkdir -p "$job"
    if ! alive && [ "$(cat "$job/token" 2>/dev/null)" != "$2" ]; then
        rm -f "$job/exit" "$job/pid" "$job/child"
        printf '%s' "$3" > "$job/command"
        echo "--- $(date -u +%FT%TZ) attempt $2: $3" >> "$job/log"
        echo "$boot" > "$job/boot"
        echo "$2" > "$job/token"
        setsid bash "${BASH_SOURCE[0]}" supervise < /dev/null > /dev/null 2>&1 &
        echo $! > "$job/pid"
    fi
    report
    ;;
supervise)
    cd "$source_tree"
    export PATH=$HOME/webssl_venv/bin:$HOME/.local/bin:$PATH
    bash -c "exec $(cat "$job/command")" >> "$job/log" 2>&1 &
    echo $! > "$job/child"
    code=0
    wait $! || code=$?
    ended "$code"
    ;;
status) report ;;
stop)
    if alive; then
        if [ "$2" = TERM ]; then
            if [ -f "$job/child" ]; then
                child=$(cat "$job/child")
                kill -TERM "$child" 2>/dev/null || [ ! -d "/proc/$child" ] # it may just have ended
            fi
        else # the whole session: loaders too
            pkill -KILL --session "$(cat "$job/pid")" || [ $? -eq 1 ] # 1: nobody is left
            [ -f "$job/exit" ] || ended 137
        fi
    fi
    report
    ;;
logs) tail -n "$2" "$job/log" 2>/dev/null | sed "s/^/$name: /" ;;
*)
    echo "host.sh: $*: no such command" >&2
    exit 2
    ;;
esac
