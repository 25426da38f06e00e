"""Attention's CUDA kernels, each with one line changed, are caught: by the host, which reports what
a GPU might forgive on one day, or by the results."""

import pytest
from cuda_host import mutants
from cuda_host.build import CSRC

# Kind, of mutants_*.cu -> header -> name -> (text, another text). Not among them are changes that
# leave the kernel right: keys freed before their product has ended are not copied over until values
# are freed, which comes after it.
MUTANTS = {
    "hopper": {
        "hopper": {
            "wrong phase of the producer": ("ring.parity() ^ 1", "ring.parity()"),
            "fewer bytes expected": ("(barrier, 2 * elements)", "(barrier, elements)"),
            "the same keys in every tile": ("64 * i, first, g, b", "64 * i, 0, g, b"),
            "wrong columns of the tail": ("Tile::kMain, first,", "Tile::kMain - 8, first,"),
            "another kv head's keys": ("at.g * maps.step_g", "0 * maps.step_g"),
            "another sample's keys": ("at.b * maps.step_b", "0 * maps.step_b"),
            "groups without rows are waited for": ("4 * groups);", "4 * Tile::kConsumers);"),
            "no fence after init": ("    fence_proxy_async();\n  }\n", "  }\n"),
            "no barrier after init": ("  __syncthreads();\n", ""),
            "no fence after the queries": ("  fence_proxy_async();\n  named", "  named"),
            "no barrier after the queries": ("  named_barrier(1 + group, 128);\n", ""),
            "one barrier for all groups": ("(1 + group, 128)", "(1, 128)"),
            "every group has the first one's rows": ("Tile::kGroupRows * group", "0 * group"),
            "every stage in one place": (
                "Tile::kKeysAt + ring.stage() * Tile::kKeyElements", "Tile::kKeysAt",
            ),
            "no gate": (": p.gate,", ": Values{nullptr, Dtype::kFloat, false},"),
            "statistics of the other softmax": ("p.stats : p.text_stats", "p.text_stats : p.stats"),
            "the image is lost": ("keep_sums<true, 32>", "keep_sums<false, 32>"),
            "results over sums": ("  __syncwarp();  // the sums are read\n", ""),
        },
        "hopper_warp": {
            "the first keys never freed": (
                "    free_stage(Tile::kKeysFree, 0);\n    scores", "    scores",
            ),
            "keys freed by all lanes": ("if (lane_index() == 0) mbarrier", "mbarrier"),
            "no wait for the scores": ("wgmma_wait<1>();", ""),
            "no wait for the values' product": (
                "      wgmma_wait<0>();\n      free_stage(Tile::kValuesFree, 0);\n      after",
                "      free_stage(Tile::kValuesFree, 0);\n      after",
            ),
            "no wait for a copy of values": (
                "      mbarrier_wait(ring.at(Tile::kValuesFull), ring.parity());\n", "",
            ),
            "wrong phase of a consumer": ("ring.parity(after));", "ring.parity());"),
            "stale stage": ("(n + after) % Tile::kStages", "n % Tile::kStages"),
            "no fence before the values' product": (
                "    wgmma_fence();\n#pragma unroll\n    for (int k = 0; k < Tile::kKeys / 16",
                "#pragma unroll\n    for (int k = 0; k < Tile::kKeys / 16",
            ),
            "no tail of the keys' product": ("k < Tile::kKeyTail / 16", "k < 0"),
            "wrong stride of keys": ("(keys, 128, 1024", "(keys, 128, 512"),
            "wrong rows of values": ("advance(value, 16 * k * 64)", "advance(value, 8 * k * 64)"),
            "no swizzle of the queries' tail": (
                "swizzled(Tile::kKeyTail * row + rest, 2 * Tile::kKeyTail)",
                "Tile::kKeyTail * row + rest",
            ),
            "no mask": ("if (!walk.full()) mask(walk);", ""),
            "masks of whole words": ("(kAllLanes, mine == ~0u)", "(kAllLanes, mine != 0)"),
            "masks of other lanes": ("lane_index() % 4 * 2;", "lane_index() % 4;"),
            "sums not rescaled": ("      rescale(factor);\n", ""),
            "total not rescaled": ("      row.total *= factor[i];\n", ""),
            "no scale": ("exp2_approx(below * split.outer)", "exp2_approx(below)"),
            "the weights of the tile before": ("round_weights();\n      ++ring", "++ring"),
        },
    },
    "backward": {
        "terms": {
            "e of another scale": ("lane == 0 ? p.before * total", "lane == 0 ? total"),
            "wrong stride": ("h * p.step_h;", "h * p.step_l;"),
            "no gate": (": tanhf(load1(p.gate, h))", ": 1.0f"),
            "lanes not added up": ("  total += __shfl_xor_sync(kAllLanes, total, 2);\n", ""),
        },
        "dq": {
            "no barrier between passes": (
                "    __syncthreads();  // rows, the last tile, and the terms of the last pass are"
                " where they belong\n", "",
            ),
            "no wait for a copy": ("      copy_async_wait<0>();\n", ""),
            "no barrier in the loop": ("<0>();\n      __syncthreads();\n", "<0>();\n"),
            "stale stage": ("stage ^= 1) {", "stage ^= 0) {"),
            "copy over what is read": ("copy(stage ^ 1, walk.first)", "copy(stage, walk.first)"),
            "wrong rows": ("first_row + 16 * m + 8 * i", "first_row + 16 * m + 4 * i"),
            "no mask": ("          warp.mask(bits);\n", ""),
            "masks of other keys": ("tile_bits >> step", "tile_bits >> 0"),
            "the image's scale for the text": ("*= p.fwd.keys[1].scale", "*= p.fwd.keys[0].scale"),
            "no scale of the image": ("warp.sums, keys.scale / p.before[0]", "warp.sums, 1.0f"),
            "wrong sign of the text's part": ("*image - p.before", "*image + p.before"),
            "no e": ("fmaf(x, before, -e[m][i / 2])", "x * before"),
            "results over the last tile": ("  __syncthreads();  // the last tile is read\n", ""),
            "rows read before they are there": ("__syncwarp();\n  warp.q", "warp.q"),
            "q for dout": ("warp.dout.begin(own + Tile::kOwn)", "warp.dout.begin(own)"),
        },
        "dkv": {
            "tiles over v": ("    __syncthreads();  // v is read\n", ""),
            "no wait for a copy": ("      copy_async_wait<0>();\n", ""),
            "copy over what is read": ("copy(stage ^ 1, first", "copy(stage, first"),
            "terms of the other stage": ("(stage * Tile::kRows + step)", "step"),
            "no e": ("fmaf(dx, before, -row.z)", "dx * before"),
            "no scale": ("keys().scale / p.before[branch()]", "1.0f"),
            "masked keys have gradients": (
                "return is_valid(keys(), locate().b,", "return true; (void)(",
            ),
            "every warp has the first one's keys": (
                "locate().first_key + warp_row()", "locate().first_key",
            ),
            "the last rows left out": ("first < p.fwd.rows;", "first + 8 < p.fwd.rows;"),
            "v for k": ("warp.k.begin(own())", "warp.k.begin(tiles + warp_row() * Tile::kStep)"),
        },
        "bwd_mma": {
            "half of the tail twice": ("left, {b[1]}", "left, {b[0]}"),
            "results before they are read": ("  __syncwarp();  // what was there is read\n", ""),
        },
        "bwd": {
            "blocks of the text counted twice": (
                "    if (branch == 0) block -= p.text_blocks;\n", "",
            ),
            "results of another sample": ("static_cast<int64_t>(b) * count + key", "key"),
        },
    },
    "split": {
        "split": {
            "every part has all keys' beginning": ("? part * p.part_keys : 0", "? 0 : 0"),
            "parts in one place": ("before = part * p.rows", "before = 0"),
            "no mask": ("if (bits != walk.kFull) warp.mask(bits);", ""),
            "no barrier in the loop": ("<0>();\n    __syncthreads();\n", "<0>();\n"),
            "totals not weighted": ("weight * own.y", "own.y"),
            "not divided": ("  out *= all.factor(1.0f);\n", ""),
            "tops of parts forgotten": ("(own.x - all.shift())", "(own.x)"),
            "no gate": ("text.factor(gate)", "text.factor(1.0f)"),
        },
    },
}  # fmt: skip
MUTATIONS = {
    f"{header}: {name}": (kind, f"gqa_attention_{header}.cuh", *texts)
    for kind, headers in MUTANTS.items()
    for header, found in headers.items()
    for name, texts in found.items()
}


@pytest.fixture(scope="module", autouse=True)
def cuda_host():
    """The library of all kernels is not needed."""


every_kind = pytest.mark.parametrize("kind", MUTANTS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_changed_is_there_once(name):
    _, header, old, new = MUTATIONS[name]
    assert (CSRC / "cuda" / header).read_text().count(old) == 1 and old != new


@pytest.mark.slow
@every_kind
def test_what_is_not_changed_is_right(kind):
    library = mutants.library(kind)
    for _ in range(2):  # the host runs the threads in both orders
        mutants.assert_right(kind, mutants.compute(library, kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutant_is_caught(name, tmp_path):
    kind, header, old, new = MUTATIONS[name]
    (tmp_path / "cuda").mkdir()
    text = (CSRC / "cuda" / header).read_text()
    (tmp_path / "cuda" / header).write_text(text.replace(old, new))
    library = mutants.library(kind, tmp_path)
    with pytest.raises((RuntimeError, AssertionError)):
        for _ in range(2):
            mutants.assert_right(kind, mutants.compute(library, kind))
