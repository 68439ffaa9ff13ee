"""Each published format, in its own layout, becomes the events that one would write by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from pipelines.adapters import ADAPTERS, adapted_rows, load_adapter, log_files
from pipelines.errors import ConfigError, DataError
from pipelines.lake_rows import LAKE_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# 2026-01-01T00:00:00Z in ms
ORIGIN = 1_767_225_600_000

ATTRIBUTION = (
    "timestamp\tuid\tcampaign\tconversion\tconversion_timestamp\tconversion_id\tattribution\tclick\tclick_pos\t"
    "click_nb\tcost\tcpo\ttime_since_last_click\tcat1\tcat2\tcat3\tcat4\tcat5\tcat6\tcat7\tcat8\tcat9"
)
CATS = "5824233\t9312274\t3490278\t29196072\t11409686\t1973606\t25162884\t29196072\t29196072"
NOT_CLICKED = f"0\t20073966\t22589171\t0\t-1\t-1\t0\t0\t-1\t-1\t0.00001\t0.390794\t-1\t{CATS}"
FIRST_OF_TWO = f"3\t7306395\t29427842\t1\t1449193\t3063962\t1\t1\t0\t2\t0.000094\t0.154785\t423858\t{CATS}"
LAST_OF_TWO = f"9\t7306395\t29427842\t1\t1449193\t3063962\t1\t1\t1\t2\t0.000094\t0.154785\t6\t{CATS}"
SOON = f"20\t1\t2\t1\t24\t77\t0\t1\t0\t1\t0.000094\t0.5\t-1\t{CATS}"
FEATURES = dict(zip((f"cat{k}" for k in range(1, 10)), CATS.split("\t"), strict=True))


def read(
    spark: SparkSession, name: str, folder: Path, mapping: str | None = None, origin: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the lake by kind, in order of their files and lines; only columns that are not null."""
    path = None
    if mapping is not None:
        path = folder / "mapping.toml"
        path.write_text(mapping)
    adapter = load_adapter(name, path, origin)
    names = sorted(entry.name for entry in folder.iterdir())
    found = log_files(adapter, names, str(folder))
    paths = {role: [str(folder / file) for file in files] for role, files in found.items()}
    table = adapted_rows(spark, adapter, paths).toArrow()
    assert table.schema.names == LAKE_SCHEMA.names
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: (row["source"], row["offset"])):
        kind = row.pop("kind")
        kinds.setdefault(kind, []).append({name: value for name, value in row.items() if value is not None})
    return kinds


def hashed(line: str) -> str:
    """XXH64 with seed 42, then with that hash as its seed."""
    first = xxhash.xxh64_intdigest(line.encode(), 42)
    return f"{first:016x}{xxhash.xxh64_intdigest(line.encode(), first):016x}"


def test_criteo_attribution(spark: SparkSession, tmp_path: Path) -> None:
    lines = [ATTRIBUTION, NOT_CLICKED, FIRST_OF_TWO, SOON]
    with gzip.open(tmp_path / "criteo_attribution_dataset.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    found = read(spark, "criteo-attribution", tmp_path)
    place = {"source": "criteo_attribution_dataset.tsv.gz", "partition": 0, "row": 0}
    first, second, third = (hashed(line) for line in lines[1:])
    (impression, *others) = found["impression"]
    assert json.loads(impression.pop("features")) == {"campaign_id": "22589171", **FEATURES}
    assert impression == {
        **place,
        "offset": 1,
        "event_id": first,
        "impression_id": first,
        "event_time": ORIGIN,
        "arrival_time": ORIGIN,
        "user_id": "20073966",
        "item_id": "22589171",
    }
    assert json.loads(others[0]["features"])["time_since_last_click"] == 423858
    # No click time is known: 10 s by default, but no later than the conversion, which came after 4 s.
    assert found["click"] == [
        {
            **place,
            "offset": offset,
            "event_id": f"{impression_id}-click",
            "impression_id": impression_id,
            "event_time": time,
            "arrival_time": time,
        }
        for offset, impression_id, time in ((2, second, ORIGIN + 13_000), (3, third, ORIGIN + 24_000))
    ]
    # What an order is worth is only told where it was attributed.
    assert found["conversion"] == [
        {
            **place,
            "offset": offset,
            "event_id": f"{impression_id}-conversion",
            "impression_id": impression_id,
            "event_time": time,
            "arrival_time": time,
            "op": "assert",
            **value,
        }
        for offset, impression_id, time, value in (
            (2, second, ORIGIN + 1_449_193_000, {"value": 0.154785}),
            (3, third, ORIGIN + 24_000, {}),
        )
    ]
    assert set(found) == {"impression", "click", "conversion"}


@pytest.mark.parametrize(
    ("credit", "expected"), [("any", [1, 1, 1]), ("last", [0, 1, 0]), ("linear", [0.5, 0.5, 0])]
)
def test_criteo_attribution_credits_clicks_as_asked(
    spark: SparkSession, tmp_path: Path, credit: str, expected: list[float]
) -> None:
    (tmp_path / "a.tsv").write_text("\n".join([ATTRIBUTION, FIRST_OF_TWO, LAST_OF_TWO, SOON]) + "\n")
    found = read(spark, "criteo-attribution", tmp_path, f'credit = "{credit}"')
    credits = {row["offset"]: row.get("credit", 1) for row in found["conversion"]}
    assert [credits.get(offset, 0) for offset in (1, 2, 3)] == expected


def test_lines_that_cannot_be_used_are_dead_letters(spark: SparkSession, tmp_path: Path) -> None:
    cells = FIRST_OF_TWO.split("\t")

    def line(**changes: str) -> str:
        names = ATTRIBUTION.split("\t")
        return "\t".join(changes.get(name, cell) for name, cell in zip(names, cells, strict=True))

    bad = {
        "expected 22 cells. Received: 21.": FIRST_OF_TWO.rpartition("\t")[0],
        "expected 22 cells. Received: more than 22.": FIRST_OF_TWO + "\t1",
        "timestamp must be a number of seconds. Received: 'noon'.": line(timestamp="noon"),
        "click must be 0 or 1. Received: '2'.": line(click="2"),
        "conversion must be 0 or 1. Received: nothing.": line(conversion=""),
        "conversion_timestamp must be a number of seconds. Received: 'x'.": line(conversion_timestamp="x"),
        "the conversion must not be before the impression. "
        "Received: 1767225602000 < 1767225603000 (ms).": line(conversion_timestamp="2"),
        "user_id must be a string that is not empty. Received: nothing.": line(uid=""),
        "click_pos of an attributed click must lie between 0 and click_nb. Received: '2 of 2'.": line(
            click_pos="2"
        ),
        "feature time_since_last_click must be a whole number. Received: '1.5'.": line(
            time_since_last_click="1.5"
        ),
    }
    # A line without text is no row, but counts as a line.
    lines = [ATTRIBUTION, NOT_CLICKED, "", *bad.values(), SOON]
    (tmp_path / "a.tsv").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    found = read(spark, "criteo-attribution", tmp_path)
    assert [row["offset"] for row in found["impression"]] == [1, 3 + len(bad)]
    *letters, binary = found["dead_letter"]
    assert [letter["reason"] for letter in letters] == [f"impressions: {reason}" for reason in bad]
    assert [letter["payload"] for letter in letters] == [*bad.values()]
    assert [letter["offset"] for letter in letters] == [*range(3, 3 + len(bad))]
    assert {letter["source"] for letter in letters} == {"a.tsv"}
    assert (binary["payload"], binary["offset"]) == ("\ufffd\ufffd", 4 + len(bad))
    assert binary["reason"] == "impressions: expected UTF-8 text. Received bytes that are none."
    assert set(letters[0]) == {"source", "partition", "offset", "row", "reason", "payload"}


def test_lines_of_split_files_keep_their_numbers(spark: SparkSession, tmp_path: Path) -> None:
    for name, n in (("a.tsv", 700), ("b.tsv", 300)):
        lines = [NOT_CLICKED.replace("0\t", f"{k}\t", 1) for k in range(n)]
        (tmp_path / name).write_text("\n".join([ATTRIBUTION, *lines, "short", ""]))
    before = spark.conf.get("spark.sql.files.maxPartitionBytes")
    spark.conf.set("spark.sql.files.maxPartitionBytes", "10000b")
    try:
        found = read(spark, "criteo-attribution", tmp_path)
    finally:
        spark.conf.set("spark.sql.files.maxPartitionBytes", before or "128MB")
    places = [(row["source"], row["offset"], row["event_time"]) for row in found["impression"]]
    assert places == [
        (name, k + 1, ORIGIN + 1000 * k) for name, n in (("a.tsv", 700), ("b.tsv", 300)) for k in range(n)
    ]
    assert [(row["source"], row["offset"]) for row in found["dead_letter"]] == [
        ("a.tsv", 701),
        ("b.tsv", 301),
    ]


def test_criteo_conversions(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        "5\t\t1\t\t-1\t4\t5\t6\t7\t8\ta\tb\tc\td\te\tf\tg\th\t",
        "7\t100\t1\t2\t3\t4\t5\t6\t7\t8\t\tb\tc\td\te\tf\tg\th\ti",
        "9\t8\t1\t2\t3\t4\t5\t6\t7\t8\ta\tb\tc\td\te\tf\tg\th\ti",
        "9\t10\tx\t2\t3\t4\t5\t6\t7\t8\ta\tb\tc\td\te\tf\tg\th\ti",
    ]
    (tmp_path / "data.txt").write_text("\n".join(lines) + "\n")
    origin = 86_400_000
    found = read(spark, "criteo-conversions", tmp_path, origin=origin)
    first, second = found["impression"]
    assert json.loads(first["features"]) == {
        **{"int1": 1, "int3": -1, "int4": 4, "int5": 5, "int6": 6, "int7": 7, "int8": 8},
        **{f"cat{k}": letter for k, letter in enumerate("abcdefgh", 1)},
    }
    assert (first["offset"], first["event_time"]) == (0, origin + 5_000)
    assert (first["user_id"], first["item_id"]) == ("none", "none")
    assert [row["event_time"] for row in found["click"]] == [origin + 5_000, origin + 7_000]
    (conversion,) = found["conversion"]
    assert conversion["impression_id"] == second["impression_id"] == hashed(lines[1])
    assert conversion["event_time"] == origin + 100_000
    assert [(letter["offset"], letter["reason"]) for letter in found["dead_letter"]] == [
        (
            2,
            "impressions: the conversion must not be before the impression. "
            "Received: 86408000 < 86409000 (ms).",
        ),
        (3, "impressions: feature int1 must be a whole number. Received: 'x'."),
    ]


AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
    "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def test_avazu(spark: SparkSession, tmp_path: Path) -> None:
    rest = "1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22"
    lines = [
        f"1000009418151094273,0,14102100,{rest},a99f214a,ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79",
        f"10000169349117863715,1,14102123,{rest},c357dbff,96809ac8,711ee120,1,0,15704,320,50,1722,0,35,100084,79",
        f"1,1,14102124,{rest},c357dbff,96809ac8,711ee120,1,0,15704,320,50,1722,0,35,100084,79",
    ]
    with gzip.open(tmp_path / "train.gz", "wt") as file:
        file.write("\n".join([AVAZU, *lines]) + "\n")
    (tmp_path / "test.gz").write_bytes(b"not read: it has no clicks")
    found = read(spark, "avazu", tmp_path, 'click_delay = "1m"')
    first, second = found["impression"]
    assert json.loads(first.pop("features")) == {
        **dict(zip(AVAZU.split(",")[3:], lines[0].split(",")[3:], strict=True)),
    }
    assert first == {
        "event_id": "1000009418151094273",
        "impression_id": "1000009418151094273",
        "event_time": 1_413_849_600_000,  # 2014-10-21T00:00:00Z
        "arrival_time": 1_413_849_600_000,
        "user_id": "ip-ddd2926e-44956a24",
        "item_id": "15706",
        "source": "train.gz",
        "partition": 0,
        "offset": 1,
        "row": 0,
    }
    assert second["user_id"] == "id-c357dbff"
    (click,) = found["click"]
    assert (click["impression_id"], click["event_time"]) == (
        "10000169349117863715",
        1_413_849_600_000 + 23 * 3_600_000 + 60_000,
    )
    (letter,) = found["dead_letter"]
    assert letter["reason"] == "impressions: hour must be of the form YYMMDDHH. Received: '14102124'."


def write_taobao(folder: Path) -> None:
    files = {
        "raw_sample.csv": [
            "user,time_stamp,adgroup_id,pid,nonclk,clk",
            "581738,1494137644,1,430548_1007,1,0",
            "449818,1494638778,3,430548_1007,0,1",
            "914836,1494650879,4,430548_1007,1,1",
        ],
        "ad_feature.csv": [
            "adgroup_id,cate_id,campaign_id,customer,brand,price",
            "1,9025,108570,1,NULL,170.0",
            "3,6406,83237,1,95471,0.01",
            "3,6406,83237,1,95471,99.0",
            "5,6406,83237,1,95471,cheap",
        ],
        "user_profile.csv": [
            # The published file has a space behind the last name.
            "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
            "new_user_class_level ",
            "581738,0,5,2,5,,3,0,3",
        ],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")


def test_taobao(spark: SparkSession, tmp_path: Path) -> None:
    write_taobao(tmp_path)
    found = read(spark, "taobao", tmp_path)
    first, second = found["impression"]
    assert first["features"] == (
        '{"age_level":"5","campaign_id":"108570","cate_id":"9025","cms_group_id":"5","cms_segid":"0",'
        '"customer":"1","final_gender_code":"2","new_user_class_level":"3","occupation":"0",'
        '"pid":"430548_1007","price":170,"shopping_level":"3"}'
    )
    assert (first["user_id"], first["item_id"], first["event_time"]) == ("581738", "1", 1_494_137_644_000)
    # Of two lines of an ad the first counts; a user without a profile has no such features.
    assert json.loads(second["features"]) == {
        **{"brand": "95471", "campaign_id": "83237", "cate_id": "6406", "customer": "1"},
        **{"pid": "430548_1007", "price": 0.01},
    }
    (click,) = found["click"]
    assert (click["impression_id"], click["event_time"]) == (second["event_id"], 1_494_638_788_000)
    assert [(row["source"], row["offset"], row["reason"]) for row in found["dead_letter"]] == [
        ("ad_feature.csv", 3, "ads: each key may occur once. Received again: '3'."),
        ("ad_feature.csv", 4, "ads: feature price must be a finite number. Received: 'cheap'."),
        ("raw_sample.csv", 3, "impressions: nonclk must be the opposite of clk. Received: '1'."),
    ]
    assert "conversion" not in found


def test_unusable_lines_of_a_table_that_is_known_are_not_told_again(
    spark: SparkSession, tmp_path: Path
) -> None:
    write_taobao(tmp_path)
    adapter = load_adapter("taobao")
    names = [path.name for path in tmp_path.iterdir()]
    paths = {
        role: [str(tmp_path / name) for name in found]
        for role, found in log_files(adapter, names, str(tmp_path)).items()
    }
    rows = adapted_rows(spark, adapter, paths, known=["ad_feature.csv"]).where("kind = 'dead_letter'")
    assert [row["source"] for row in rows.select("source").collect()] == ["raw_sample.csv"]


KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)


def write_kuairand(folder: Path) -> None:
    logs = {
        "standard_4_08_to_4_21": "3,7,20220408,400,1649400761123,1,0,0,0,0,0,1,20000,18500,0,0,0,0,1",
        "random_4_22_to_5_08": "3,8,20220422,400,1650600000000,0,0,0,0,0,0,0,900,18500,0,0,0,1,0",
    }
    for name, line in logs.items():
        (folder / f"log_{name}_pure.csv").write_text(f"{KUAIRAND}\n{line}\n")
    user = [
        *("user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num",),
        *("follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range",),
        *("register_days,register_days_range", *(f"onehot_feat{k}" for k in range(18))),
    ]
    values = '3,full_active,0,0,1,5,"(0,10]",312,"[100,1k)",0,0,3624,730+,' + ",".join(map(str, range(18)))
    (folder / "user_features_pure.csv").write_text(",".join(user) + f"\n{values}\n")
    video = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag"
    )
    rows = [
        '7,441,NORMAL,2020-07-08,ShortImport,1,17200.0,720,1280,989206467,4.0,"12,65"',
        "8,442,AD,2020-07-08,ShortImport,1,,720,1280,,4.0,9",
    ]
    (folder / "video_features_basic_pure.csv").write_text("\n".join([video, *rows]) + "\n")


def test_kuairand(spark: SparkSession, tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    found = read(spark, "kuairand", tmp_path)
    random, standard = found["impression"]
    assert random["source"] == "log_random_4_22_to_5_08_pure.csv"
    assert random["propensity"] == pytest.approx(1 / 7583)
    assert "propensity" not in standard
    assert json.loads(standard["features"]) == {
        **{"user_active_degree": "full_active", "is_lowactive_period": "0", "is_live_streamer": "0"},
        **{"is_video_author": "1", "follow_user_num": 5, "follow_user_num_range": "(0,10]"},
        **{"fans_user_num": 312, "fans_user_num_range": "[100,1k)", "friend_user_num": 0},
        **{"friend_user_num_range": "0", "register_days": 3624, "register_days_range": "730+"},
        **{f"onehot_feat{k}": str(k) for k in range(18)},
        **{"author_id": "441", "video_type": "NORMAL", "upload_dt": "2020-07-08"},
        **{"upload_type": "ShortImport", "video_duration": 17200, "server_width": 720},
        **{"server_height": 1280, "music_id": "989206467", "music_type": "4.0", "tag": ["12", "65"]},
        **{"tab": "1"},
    }
    assert not {"video_duration", "music_id"} & set(json.loads(random["features"]))
    (click,) = found["click"]
    assert click["event_time"] == 1_649_400_762_123
    # By the end of play the long view is known.
    (conversion,) = found["conversion"]
    assert conversion["event_time"] == 1_649_400_782_123
    assert conversion["impression_id"] == click["impression_id"] == standard["event_id"]


def test_kuairand_takes_the_feedback_that_is_asked_for(spark: SparkSession, tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    found = read(spark, "kuairand", tmp_path, 'conversion = "is_like"\nrandom_pool = 100')
    assert "conversion" not in found
    assert found["impression"][0]["propensity"] == 0.01


def test_header_without_a_column_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,click\n1,0\n")
    with pytest.raises(
        DataError, match=r"train.csv: expected the columns id, click, hour.* Missing: hour, C1"
    ):
        read(spark, "avazu", tmp_path)


def test_folder_without_the_files_of_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected raw_sample\*.csv .* The folder has: other.csv"):
        log_files(load_adapter("taobao"), ["other.csv"], str(tmp_path))


@pytest.mark.parametrize("name", ["avazu", "taobao", "kuairand"])
def test_origin_is_refused_where_times_are_dates(name: str) -> None:
    with pytest.raises(ConfigError, match="--origin is for times that count from an unknown begin"):
        load_adapter(name, origin=ORIGIN)


def test_unknown_option_of_a_format_names_the_nearest(tmp_path: Path) -> None:
    mapping = tmp_path / "options.toml"
    mapping.write_text('clik_delay = "10s"')
    for name in sorted(set(ADAPTERS) - {"table", "criteo-conversions"}):
        with pytest.raises(ConfigError, match="unknown mapping key clik_delay") as caught:
            load_adapter(name, mapping)
        assert caught.value.hint == "did you mean click_delay?"
