"""Arguments that several benchmarks take."""

import argparse
import ast


def add_training_arguments(parser):
    """Add seeds, threads and the parameters of the method, a dict, to a parser."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--params",
        nargs="+",
        default={},
        action=NamedValues,
        metavar="NAME=VALUE",
        help="of the method",
    )


class NamedValues(argparse.Action):
    """Action that keeps texts such as ``name=3`` as a dict of literals."""

    def __call__(self, parser, namespace, texts, option_string=None):
        pairs = (text.partition("=") for text in texts)
        values = {name: ast.literal_eval(value) for name, _, value in pairs}
        setattr(namespace, self.dest, values)
