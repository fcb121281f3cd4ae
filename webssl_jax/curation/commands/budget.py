"""What curating a crawl would take, before anything is bought."""

from __future__ import annotations

import dataclasses
from typing import Any

from webssl_jax import cli
from webssl_jax.curation import planning
from webssl_jax.curation.commands import flags


def _flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--addresses", type=flags.amount, required=True, metavar="N", help="of images, as in 2.5e9"
    )
    parser.add_argument("--machines", type=flags.positive, required=True, metavar="N")
    parser.add_argument("--cores", type=flags.positive, required=True, metavar="N", help="of each")
    parser.add_argument(
        "--gigabits", type=flags.amount, default=10.0, metavar="X", help="a second, of each (10)"
    )
    parser.add_argument(
        "--price", type=flags.amount, required=True, metavar="X", help="dollars a machine hour"
    )
    parser.add_argument("--accelerators", type=flags.positive, required=True, metavar="N")
    parser.add_argument(
        "--accelerator-price", type=flags.amount, required=True, metavar="X", help="dollars an hour"
    )
    for field in dataclasses.fields(planning.Rates):
        name = field.name.replace("_", "-")
        parser.add_argument(
            f"--rate-{name}",
            dest=f"rate_{field.name}",
            type=flags.amount,
            default=field.default,
            metavar="X",
            help=f"default: {field.default:g}",
        )


def _run(args: Any) -> int:
    names = [field.name for field in dataclasses.fields(planning.Rates)]
    rates = planning.Rates(**{name: getattr(args, f"rate_{name}") for name in names})
    fleet = planning.Fleet(
        args.machines,
        args.cores,
        args.gigabits,
        args.price,
        args.accelerators,
        args.accelerator_price,
    )
    print(planning.table(planning.plan(args.addresses, fleet, rates)))
    return 0


COMMANDS = {
    "plan": flags.Command("hours and dollars of curating a crawl", _flags, _run, output=None)
}
