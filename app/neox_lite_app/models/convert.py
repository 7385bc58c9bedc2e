"""neox-lite quantize, export and import: the quantizer, the GGUF writer and its reader, each with a progress bar."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from neox_lite.checkpoint.folder_writer import JOURNAL
from neox_lite.errors import ArgumentError
from neox_lite.formats import label, make_format
from neox_lite.units import parse_bytes
from neox_lite_quant import Report, convert, export_gguf, import_gguf

from ..load_for_command import default_threads
from ..terminal import amount, bar, note, print_json
from .inspect_model import logits_problem


def quantize(args: argparse.Namespace) -> None:
    options = {"group_size": args.group_size, "method": args.method, "revision": args.revision, "dtype": args.dtype}
    options |= {"format": args.format or "int4", "small_head": args.head == "int8"}
    if args.target_size is not None:
        if args.format is not None or args.group_size is not None:
            raise ArgumentError(
                "--target-size chooses formats and groups by itself; leave --format and --group-size out"
            )
        options["target_size"] = parse_bytes(args.target_size)
        name = f"mixed {args.target_size.strip()}"
    else:
        name = label(make_format(options["format"], args.group_size), options["format"])
    destination = args.destination or f"{Path(args.source).absolute().resolve().name}-{name.replace(' ', '-')}"
    options |= {"threads": args.threads or default_threads(), "keep_source": args.keep_source}
    if args.calibration is not None or args.calibration_windows is not None:
        options |= {"calibration": args.calibration, "calibration_windows": args.calibration_windows}
    calibrated = args.method == "gptq"
    if calibrated and not args.dry_run:  # before anything starts
        report = convert(args.source, destination, dry_run=True, **options)
        needs = f"gptq takes about {report.seconds:.0f} s, up to {amount(report.peak_bytes, 'B')} of memory"
        note(f"{needs}, and {amount(report.scratch_bytes, 'B')} of disk in the folder for a while")
    if args.dry_run:
        with bar("choose formats", "layer") as choosing:
            report = convert(args.source, destination, dry_run=True, choosing=choosing, **options)
    else:
        with (
            bar("choose formats", "layer") as choosing,
            bar(" ".join(filter(None, (name, args.method))), "step" if calibrated else "B") as progress,
        ):
            try:
                report = convert(args.source, destination, progress=progress, choosing=choosing, **options)
            except KeyboardInterrupt:
                if (Path(destination) / JOURNAL).exists():
                    note(
                        f"\n{destination} is unfinished; the same command goes on from the weight files that are whole"
                    )
                raise
    problem = None if args.dry_run else logits_problem(report.destination)
    if problem is not None:
        note(f"warning: {problem}")
    if args.json:
        figures = ("bytes_in", "bytes_out", "seconds", "peak_bytes", "scratch_bytes", "bits_per_weight", "mix")
        print_json({"destination": str(report.destination), **{k: getattr(report, k) for k in figures}})
    else:
        verb = "would be" if args.dry_run else "is"
        print(f"{report.destination} {verb} {amount(report.bytes_out, 'B')}, from {amount(report.bytes_in, 'B')}")
        if args.target_size is not None:
            mix = ", ".join(f"{count} {name}" for name, count in sorted(report.mix.items()))
            print(f"linear layers: {mix}: {report.bits_per_weight:.3f} bits a weight")
        if args.dry_run:
            if calibrated:
                note(f"and {amount(report.scratch_bytes, 'B')} of disk in the folder for a while")
            memory = amount(report.peak_bytes, "B")
            note(
                f"about {report.seconds:.0f} s, without any download, and at most {memory} of memory beyond mapped files"
            )
        else:
            note(f"{report.seconds:.1f} s, at most {amount(report.peak_bytes, 'B')} of memory beyond mapped files")
            note(f"next: neox-lite generate {shlex.quote(str(report.destination))} --prompt 'Once upon a time'")


def export(args: argparse.Namespace) -> None:
    with bar(f"write {args.to}") as progress:
        report = export_gguf(args.model, args.destination, args.head, args.revision, progress)
    _tell(report, args.json)


def import_file(args: argparse.Namespace) -> None:
    with bar("read gguf") as progress:
        report = import_gguf(args.source, args.destination, args.dtype, args.hidden_act, progress)
    _tell(report, args.json)


def _tell(report: Report, json: bool) -> None:
    if json:
        figures = ("bytes_in", "bytes_out", "seconds", "peak_bytes")
        print_json({"destination": str(report.destination), **{k: getattr(report, k) for k in figures}})
    else:
        print(f"{report.destination} is {amount(report.bytes_out, 'B')}, from {amount(report.bytes_in, 'B')}")
        note(f"{report.seconds:.1f} s, at most {amount(report.peak_bytes, 'B')} of memory beyond mapped files")
