import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from redmux_adapters import Edit
from redmux_server.engine.bank import IDENTITY, AdapterBank

DIMS = {"l.0.a": 2, "l.0.b": 3, "l.1.a": 2, "l.1.b": 3}


def make_bank(*, max_bytes=0, min_slots=4, dims=DIMS, dtype=torch.float32):
    return AdapterBank(
        dims, device=torch.device("cpu"), dtype=dtype, max_bytes=max_bytes, min_slots=min_slots
    )


def edits(seed, sites=("l.0.a",)):
    generator = torch.Generator().manual_seed(seed)
    return {site: Edit(*torch.randn(2, DIMS[site], generator=generator).unbind()) for site in sites}


def read(bank, slot, site):
    """The (scale, bias) that a row holds for a site."""
    columns = bank.layout[site]
    row = bank.rows([slot])[0]
    middle = columns.start + columns.dim
    return row[columns.start : middle], row[middle : columns.stop]


def assert_holds(bank, slot, wanted):
    for site, columns in bank.layout.items():
        edit = wanted.get(site, Edit.identity(columns.dim))
        scale, bias = read(bank, slot, site)
        assert torch.equal(scale, edit.scale), site
        assert torch.equal(bias, edit.bias), site


def test_a_row_holds_the_vectors_of_its_adapter():
    bank = make_bank()
    one = edits(1, ["l.0.a", "l.1.b"])
    assert_holds(bank, bank.acquire("one", one), one)


def test_slot_zero_is_the_identity_before_and_after_layouts_grow():
    bank = make_bank()
    bank.acquire("one", edits(1, ["l.0.a"]))
    assert_holds(bank, IDENTITY, {})
    bank.acquire("two", edits(2, ["l.1.b"]))
    assert_holds(bank, IDENTITY, {})


def test_an_adapter_is_the_identity_where_it_edits_nothing():
    bank = make_bank()
    bank.acquire("one", edits(1, ["l.0.a"]))
    slot = bank.acquire("two", edits(2, ["l.1.b"]))
    scale, bias = read(bank, slot, "l.0.a")
    assert torch.equal(scale, torch.ones(2))
    assert torch.equal(bias, torch.zeros(2))


def test_new_sites_leave_the_rows_before_them_right():
    bank = make_bank()
    one = edits(1, ["l.1.a"])
    slot = bank.acquire("one", one)
    bank.acquire("two", edits(2, DIMS))
    assert_holds(bank, slot, one)


def test_columns_of_sites_never_overlap_and_fill_the_row():
    bank = make_bank()
    bank.acquire("one", edits(1, ["l.1.a", "l.0.b"]))
    bank.acquire("two", edits(2, DIMS))
    taken = sorted(c for s in bank.layout.values() for c in range(s.start, s.stop))
    assert taken == list(range(bank.rows([0]).shape[1]))


def test_a_resident_adapter_is_not_filled_again():
    bank = make_bank()
    first = bank.acquire("one", edits(1))
    bank.release(first)
    assert bank.acquire("one", edits(1)) == first
    assert bank.num_fills == 1
    assert bank.num_resident == 1


def test_a_row_in_use_is_not_given_away():
    bank = make_bank(min_slots=3)
    kept = bank.acquire("kept", edits(0))
    for seed in range(1, 6):
        bank.release(bank.acquire(f"d{seed}", edits(seed)))
    assert_holds(bank, kept, edits(0))


def test_a_row_with_one_of_two_users_left_is_not_given_away():
    bank = make_bank(min_slots=3)
    kept = bank.acquire("kept", edits(0))
    bank.acquire("kept", edits(0))
    bank.release(kept)
    for seed in range(1, 6):
        bank.release(bank.acquire(f"d{seed}", edits(seed)))
    assert_holds(bank, kept, edits(0))


def test_the_least_recently_used_row_is_reused_first():
    bank = make_bank(min_slots=4)
    for name in ("a", "b", "c"):
        bank.release(bank.acquire(name, edits(1)))
    bank.release(bank.acquire("a", edits(1)))
    bank.acquire("d", edits(1))
    fills = bank.num_fills
    bank.acquire("c", edits(1))
    bank.acquire("a", edits(1))
    assert bank.num_fills == fills
    bank.release(bank.acquire("d", edits(1)))
    assert bank.num_resident == 3


def test_releasing_a_free_row_is_refused():
    bank = make_bank()
    slot = bank.acquire("one", edits(1))
    bank.release(slot)
    with pytest.raises(AssertionError, match=f"slot {slot} is not in use"):
        bank.release(slot)


def test_the_bank_grows_to_its_bytes_and_no_further():
    row_bytes = 2 * DIMS["l.0.a"] * 4
    bank = make_bank(max_bytes=20 * row_bytes, min_slots=2)
    for seed in range(50):
        bank.release(bank.acquire(f"d{seed}", edits(seed)))
    assert bank.num_slots == 20
    assert bank.nbytes == 20 * row_bytes


def test_the_bank_has_its_least_slots_even_without_bytes():
    bank = make_bank(max_bytes=0, min_slots=12)
    slots = [bank.acquire(f"d{seed}", edits(seed)) for seed in range(11)]
    assert sorted(slots) == list(range(1, 12))
    for seed, slot in enumerate(slots):
        assert_holds(bank, slot, edits(seed))


def test_rows_are_kept_while_the_batch_stands():
    bank = make_bank()
    slot = bank.acquire("one", edits(1))
    assert bank.rows([slot, 0]) is bank.rows([slot, 0])


def test_rows_come_in_the_order_asked_for():
    bank = make_bank()
    one, two = bank.acquire("one", edits(1)), bank.acquire("two", edits(2))
    assert torch.equal(bank.rows([two, 0, one, two])[[2, 0]], bank.rows([one, two]))


def test_a_slot_whose_row_was_given_away_reads_nothing():
    bank = make_bank(min_slots=2)
    slot = bank.acquire("one", edits(1))
    bank.rows([slot])
    bank.release(slot)
    other = bank.acquire("two", edits(2))
    assert other != slot
    assert_holds(bank, other, edits(2))
    with pytest.raises(KeyError):
        bank.rows([slot])


def test_wider_rows_take_no_more_bytes():
    narrow, wide = 8 * DIMS["l.0.a"], 8 * sum(DIMS.values())
    bank = make_bank(max_bytes=40 * narrow, min_slots=3)
    kept = bank.acquire("kept", edits(0))
    for seed in range(1, 60):
        bank.release(bank.acquire(f"d{seed}", edits(seed)))
    assert bank.nbytes == 40 * narrow
    slot = bank.acquire("wide", edits(99, list(DIMS)))
    assert bank.nbytes <= max(40 * narrow, 3 * wide)
    assert bank.num_resident >= 2
    assert_holds(bank, kept, edits(0))
    assert_holds(bank, slot, edits(99, list(DIMS)))


def test_rows_are_new_once_the_layout_grows():
    bank = make_bank()
    slot = bank.acquire("one", edits(1))
    narrow = bank.rows([slot]).shape[1]
    bank.acquire("two", edits(2, ["l.1.b"]))
    assert bank.rows([slot]).shape[1] == narrow + 2 * DIMS["l.1.b"]


@pytest.mark.parametrize("slot", [-1, 1000])
def test_a_slot_outside_the_bank_is_refused(slot):
    bank = make_bank()
    bank.acquire("one", edits(1))
    with pytest.raises(KeyError):
        bank.rows([0, slot])


def test_rows_have_the_dtype_of_the_model():
    bank = make_bank(dtype=torch.bfloat16)
    slot = bank.acquire("one", edits(1))
    scale, bias = read(bank, slot, "l.0.a")
    assert torch.equal(scale, edits(1)["l.0.a"].scale.bfloat16())
    assert torch.equal(bias, edits(1)["l.0.a"].bias.bfloat16())


def make_preallocated(**options):
    values = {"max_bytes": 0, "min_slots": 4} | options
    return AdapterBank(
        DIMS, device=torch.device("cpu"), dtype=torch.float32, preallocated=True, **values
    )


def test_a_preallocated_table_stays_while_adapters_of_its_sites_come_and_go():
    bank = make_preallocated()
    bank.reserve(["l.0.a", "l.1.a"])
    table = bank.table
    assert bank.num_slots == 4
    kept = bank.acquire("kept", edits(0))
    for seed in range(1, 9):
        slot = bank.acquire(f"d{seed}", edits(seed, ["l.0.a", "l.1.a"]))
        (row,) = bank.table_rows([slot])
        columns = bank.layout["l.1.a"]
        assert torch.equal(
            table[row, columns.start : columns.start + 2],
            edits(seed, ["l.0.a", "l.1.a"])["l.1.a"].scale,
        )
        bank.release(slot)
    assert bank.table is table
    assert_holds(bank, kept, edits(0))


def test_sites_of_a_new_kind_move_a_preallocated_table_once():
    bank = make_preallocated(max_bytes=1000)
    bank.reserve(["l.0.a"])
    assert sorted(bank.layout) == ["l.0.a", "l.1.a"]
    kept = bank.acquire("kept", edits(0, ["l.0.a"]))
    before = bank.table
    slots = [kept, bank.acquire("b0", edits(1, ["l.0.b"]))]
    moved = bank.table
    assert moved is not before
    slots.append(bank.acquire("b1", edits(2, ["l.1.b"])))
    assert bank.table is moved
    assert bank.nbytes <= 1000
    wanted = [edits(0, ["l.0.a"]), edits(1, ["l.0.b"]), edits(2, ["l.1.b"])]
    for slot, want in zip(slots, wanted, strict=True):
        assert_holds(bank, slot, want)


def test_table_rows_are_where_the_table_has_an_adapter():
    bank = make_bank()
    slots = [bank.acquire(f"d{seed}", edits(seed)) for seed in range(3)]
    rows = bank.table_rows([IDENTITY, *slots])
    assert torch.equal(bank.table[rows], bank.rows([IDENTITY, *slots]))
    assert rows[0] == 0
    with pytest.raises(KeyError):
        bank.table_rows([99])


MIN_SLOTS = 5


class BankMachine(RuleBasedStateMachine):
    """Requests come and go; a dict says which adapter each of them should see."""

    make_bank = staticmethod(make_bank)

    def __init__(self):
        super().__init__()
        self.bank = self.make_bank(min_slots=MIN_SLOTS, max_bytes=200)
        self.catalog = {}
        self.users = []  # (digest, slot)

    @precondition(lambda self: len(self.users) < MIN_SLOTS - 1)
    @rule(seed=st.integers(0, 9), sites=st.sets(st.sampled_from(sorted(DIMS)), min_size=1))
    def acquire(self, seed, sites):
        digest = f"d{seed}"
        held = self.catalog.setdefault(digest, edits(seed, sorted(sites)))
        slot = self.bank.acquire(digest, held)
        assert slot != IDENTITY
        self.users.append((digest, slot))

    @precondition(lambda self: self.users)
    @rule(index=st.integers(0, MIN_SLOTS))
    def release(self, index):
        _, slot = self.users.pop(index % len(self.users))
        self.bank.release(slot)

    @invariant()
    def every_user_sees_its_adapter(self):
        for digest, slot in self.users:
            assert_holds(self.bank, slot, self.catalog[digest])

    @invariant()
    def a_digest_has_one_slot_and_a_slot_one_digest(self):
        assert len({d for d, _ in self.users}) == len(set(self.users))
        assert len({s for _, s in self.users}) == len(set(self.users))

    @invariant()
    def the_identity_is_untouched(self):
        assert_holds(self.bank, IDENTITY, {})


class PreallocatedBankMachine(BankMachine):
    make_bank = staticmethod(make_preallocated)


TestBankMachine = BankMachine.TestCase
TestPreallocatedBankMachine = PreallocatedBankMachine.TestCase
TestBankMachine.settings = TestPreallocatedBankMachine.settings = settings(
    deadline=None, database=None, max_examples=40, stateful_step_count=30
)
