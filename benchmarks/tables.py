"""How long `csv:` takes to open a table of a million rows, and how much memory; and what a worker process is given.

    python benchmarks/tables.py [--rows 1000000]

The images are empty files in a thousand folders: every row is checked to have one, and nothing is decoded. Each
measurement is a process of its own. Memory is the largest resident set, of the whole process and above that of the same
process before it opened the table.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = 1000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    rows = arguments.parse_args().rows
    columns = (
        "opened in s | of a processor | MB in all | MB more | bytes a row in the index | worker gets, bytes | shared"
    )
    print(f"| table | rows | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        # By another process: what starts a process passes its own peak of memory on.
        subprocess.run([sys.executable, __file__, "--make", folder, str(rows)], check=True)
        for spec, task in (
            ("table.csv", "single_label"),
            ("several.csv", "multi_label"),
            ("table.parquet", "single_label"),
        ):
            done = subprocess.run(
                [sys.executable, __file__, "--child", f"csv:{folder}/{spec}", task],
                env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            row = json.loads(done.stdout)
            print(
                f"| {spec}, {task} | {rows:,} | {row['seconds']:.2f} | {row['processor']:.2f} | "
                f"{row['memory']:.0f} | {row['more']:.0f} | "
                f"{row['index']:.1f} | {row['pickled']:,} | {row['shared']:,} |",
                flush=True,
            )


def make_table(folder: str, rows: int) -> None:
    """The table in three forms, and an empty file for each of its rows."""
    import pyarrow as pa
    from pyarrow import parquet

    names, labels = [], []
    for index in range(rows):
        place = f"images/{index % FOLDERS:03}"
        if index < FOLDERS:
            os.makedirs(f"{folder}/{place}")
        names.append(f"{place}/photograph_{index:07}.jpg")
        labels.append(f"class {index * 7919 % 1000}")
        os.close(os.open(f"{folder}/{names[-1]}", os.O_CREAT | os.O_WRONLY))
    with open(f"{folder}/table.csv", "w") as file:
        file.write("image,label\n")
        file.writelines(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
    with open(f"{folder}/several.csv", "w") as file:
        file.write("image,labels\n")
        file.writelines(f"{name},{index % 20}|{index % 7}\n" for index, name in enumerate(names))
    parquet.write_table(pa.table({"image": names, "label": labels}), f"{folder}/table.parquet")


def measure(spec: str, task: str) -> dict:
    import pickle

    from tnt_jax.config import DataConfig
    from tnt_jax.data.opening import open_split
    from tnt_jax.data.workers import _Shared

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before, start, worked = peak(), time.perf_counter(), time.process_time()
    source = open_split(DataConfig(spec, task=task), "train")
    seconds, processor, after = time.perf_counter() - start, time.process_time() - worked, peak()
    buffers = []
    pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    shared = _Shared(source)
    return {
        "seconds": seconds,
        "processor": processor,
        "memory": after,
        "more": after - before,
        "index": source.files.nbytes / len(source),
        "pickled": len(shared.pickled),
        "shared": sum(shared.lengths),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*sys.argv[2:])))
    elif sys.argv[1:2] == ["--make"]:
        make_table(sys.argv[2], int(sys.argv[3]))
    else:
        main()
