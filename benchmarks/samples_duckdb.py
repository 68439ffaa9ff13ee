"""The join of `ctrstream samples build`, written for DuckDB: what `benchmarks.samples` compares with.

It reads the same Parquet files, drops redeliveries, credits the first click and labels conversions by the
same windows, and writes labelled rows with their features as Parquet. It does not encode features, sort
rows, count events, fit delays or write a manifest. Run as a process of its own, so that its memory is its.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import duckdb

from pipelines.config_sections import AttributionConfig

__all__ = ["main"]


def join(lake: Path, out: Path, as_of: int, since: int, rule: AttributionConfig, threads: int) -> None:
    """Write labelled rows of both tasks to ``out``."""
    patience = rule.click_window + rule.allowed_lateness
    con = duckdb.connect()
    con.execute(f"SET threads={threads}")
    con.execute("SET preserve_insertion_order=false")

    def events(kind: str, columns: str) -> str:
        files = f"{lake}/events/batch=*/attempt=*/kind={kind}/*/*/*.parquet"
        return f"(SELECT {columns} FROM read_parquet('{files}') WHERE arrival_time <= {as_of})"

    con.execute(f"""
    CREATE TEMP TABLE clicks AS
    WITH i AS (
        SELECT impression_id, arg_min(event_time, arrival_time) AS t, min(arrival_time) AS a
        FROM {events("impression", "impression_id, event_time, arrival_time")} GROUP BY 1),
    c AS (
        SELECT impression_id, event_id, arg_min(event_time, arrival_time) AS t, min(arrival_time) AS a
        FROM {events("click", "impression_id, event_id, event_time, arrival_time")} GROUP BY 1, 2)
    SELECT impression_id,
           arg_min(struct_pack(t := c.t, known := greatest(c.a, i.a)), (c.a, c.event_id)) AS click
    FROM c JOIN i USING (impression_id)
    WHERE c.t BETWEEN i.t AND i.t + {rule.click_window}
      AND c.a <= i.t + {patience} AND i.a - c.a <= {patience}
    GROUP BY 1""")
    con.execute(f"""
    CREATE TEMP TABLE conversions AS
    WITH v AS (
        SELECT impression_id, event_id, min(arrival_time) AS a,
               arg_min(struct_pack(t := event_time, op := op), arrival_time) AS e
        FROM {events("conversion", "impression_id, event_id, event_time, arrival_time, op")} GROUP BY 1, 2)
    SELECT impression_id, arg_max(e.op <> 'retract', (e.t, e.op = 'retract')) AS label, min(a) AS known
    FROM v JOIN clicks USING (impression_id)
    WHERE e.t BETWEEN click.t AND click.t + {rule.attribution_window}
      AND v.a <= click.t + {rule.attribution_window + rule.allowed_lateness}
      AND click.known - v.a <= {patience}
    GROUP BY 1""")
    shutil.rmtree(out, ignore_errors=True)
    con.execute(f"""
    COPY (
        WITH i AS (
            SELECT * FROM {events("impression", "*")}
            QUALIFY row_number() OVER (PARTITION BY impression_id ORDER BY arrival_time) = 1)
        SELECT impression_id, user_id, item_id, position, features, 'click' AS task, i.event_time,
               (click IS NOT NULL)::INT AS label, click.known AS known,
               {as_of} > i.event_time + {patience} AS mature
        FROM i LEFT JOIN clicks USING (impression_id)
        WHERE i.arrival_time <= i.event_time + {patience} AND i.event_time >= {since}
        UNION ALL
        SELECT impression_id, user_id, item_id, position, features, 'conversion', click.t,
               coalesce(conversions.label, false)::INT, conversions.known,
               {as_of} > click.t + {rule.attribution_window + rule.allowed_lateness}
        FROM i JOIN clicks USING (impression_id) LEFT JOIN conversions USING (impression_id)
        WHERE click.t >= {since} AND click.t < {as_of}
    ) TO '{out}' (FORMAT parquet, COMPRESSION zstd, PER_THREAD_OUTPUT true)""")


def main() -> None:
    """Join, and print rows and positives of each task as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lake", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("as-of", "since", "attribution-window", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    rule = AttributionConfig(attribution_window=options.attribution_window)
    join(options.lake, options.out, options.as_of, options.since, rule, options.threads)
    files = f"{options.out}/*.parquet"
    query = f"SELECT task, count(*), sum(label) FROM read_parquet('{files}') GROUP BY 1"
    counts = duckdb.connect().execute(query).fetchall()
    print(json.dumps({task: [rows, positives] for task, rows, positives in counts}))


if __name__ == "__main__":
    main()
