"""Hosts meet in any order, turn strangers away, learn of each other's end, and meet again."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import time

import pytest

from naign.cluster import rejoin as module
from naign.cluster.place import MOST, Place
from naign.cluster.rejoin import LIMIT, LONG, Answer, End, Hello, Hosts, Links, listen
from naign.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PEER_LOST, InputError, PeerLost, Unavailable
from tests.servers import free_port

HELLO = Hello(
    "a",
    1,
    3,
    1,
    0,
    "m",
)
pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(module, "SOON", 0.5)


def in_loop(test):
    """A test that is a coroutine, as a function."""

    @functools.wraps(test)
    def run(*given, **named):
        asyncio.run(test(*given, **named))

    return run


class Meeting:
    """Hosts of one job in one loop."""

    def __init__(self, count=3):
        self.count = count
        self.port = free_port()
        self.tasks = {}

    def host(self, index, **changed):
        place = Place(
            orchestrator="test",
            index=index,
            hosts=changed.get("hosts", self.count),
            least=changed.get("least", 0),
            head="localhost",
            start=changed.get("start", "a"),
        )
        made = Hosts(place, port=self.port, ranks=changed.get("ranks", 1), within=changed.get("within", 20.0))
        made.generation = made._newest = changed.get("generation", 0)
        return made

    def come(self, index, **changed):
        self.tasks[index] = asyncio.create_task(self._meet(self.host(index, **changed)))

    async def _meet(self, host):
        """What a host gets of its meeting, or the error of it."""
        async with host:
            try:
                return await host.meet()
            except (InputError, Unavailable, PeerLost) as error:
                return error

    async def found(self):
        """What all hosts have got, in the order of their indices."""
        for task in self.tasks.values():
            await asyncio.wait_for(task, 30)
        return [self.tasks[index].result() for index in sorted(self.tasks)]

    async def met(self):
        """All hosts, each of which has met the others."""
        found = await self.found()
        assert {type(links) for links in found} == {Links}
        return found

    @contextlib.asynccontextmanager
    async def connection(self, line):
        """A connection to host 0, once that listens, on which a line is sent."""
        deadline = time.monotonic() + 10
        while True:
            try:
                reader, writer = await asyncio.open_connection("localhost", self.port)
                break
            except OSError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        writer.write(line)
        try:
            yield reader
        finally:
            writer.close()

    def greet(self, **changed):
        return self.connection(dataclasses.replace(HELLO, hosts=self.count, **changed).line())


@in_loop
async def test_fewer_hosts_meet_where_no_more_come_and_one_that_comes_later_is_noticed():
    meeting = Meeting(4)
    first = meeting.host(0, least=2, within=15.0)
    async with first:
        late = asyncio.create_task(first.meet())
        meeting.come(3, least=2)
        links = await asyncio.wait_for(late, 10)
        other = await meeting.tasks[3]
        assert (links.hosts, links.number) == (2, 0)
        assert (other.hosts, other.number) == (2, 1)
        assert not first.newcomer
        async with meeting.greet(index=3), meeting.greet(index=1, start="another"):
            await asyncio.sleep(0.5)
        assert not first.newcomer
        async with meeting.greet(index=1):
            await module.wait_for(lambda: first.newcomer, 5)
        assert first.newcomer
        meeting.come(1, least=2)
        meeting.come(3, least=2, generation=1)
        links = await asyncio.wait_for(first.meet(), 10)
        await asyncio.gather(*meeting.tasks.values())
        assert [meeting.tasks[index].result().number for index in (1, 3)] == [1, 2]
        assert links.hosts == 3 and not first.newcomer


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
@in_loop
async def test_hosts_meet_in_any_order(order):
    meeting = Meeting(4)
    for index in order:
        meeting.come(index)
        await asyncio.sleep(0.1)
    found = await meeting.met()
    for links in found:
        assert links.address in ("127.0.0.1", "::1")
        assert links.port == found[0].port


@pytest.mark.parametrize(
    ("past", "met"),
    [
        ((0, 0, 0), 1),  # at first
        ((4, 4, 4), 5),  # none was replaced
        ((4, 0, 4), 5),
        ((0, 4, 3), 5),  # host 0 was lost before it had told all that they had met
    ],
)
@in_loop
async def test_each_meeting_is_one_more_than_any_host_has_seen(past, met):
    meeting = Meeting()
    for index, generation in enumerate(past):
        meeting.come(index, generation=generation)
    for links in await meeting.met():
        assert links.generation == met


@in_loop
async def test_the_same_hosts_meet_again_on_another_port_for_their_ranks():
    meeting = Meeting(2)
    async with meeting.host(0) as first, meeting.host(1) as second:
        for generation in (1, 2):
            for links in await asyncio.gather(first.meet(), second.meet()):
                assert links.generation == generation
                links.close()


@in_loop
async def test_a_host_that_comes_again_replaces_itself():
    meeting = Meeting()
    meeting.come(0)
    async with meeting.greet():
        await asyncio.sleep(0.3)
    meeting.come(2)
    await asyncio.sleep(0.3)
    assert not meeting.tasks[0].done()
    meeting.come(1)
    await meeting.met()


@in_loop
async def test_of_two_pods_with_one_index_the_later_goes_on_unless_it_is_of_an_older_generation(capsys):
    meeting = Meeting()
    meeting.come(0, generation=5)
    async with meeting.greet(member="earlier") as earlier, meeting.greet(member="later") as later:
        answer = Answer.read(await earlier.readline())
        assert answer.code == PEER_LOST
        async with meeting.greet(member="old", generation=3) as old:
            answer = Answer.read(await old.readline())
            assert "a host 1 of generation 3, which came after generation 5, was rejected" in answer.reason
            assert answer.code == PEER_LOST
        async with meeting.greet(index=2, generation=5) as survivor:
            for reader in (later, survivor):
                answer = Answer.read(await reader.readline())
                assert answer.go and answer.generation == 6
            (links,) = await meeting.found()
            assert links.generation == 6
    assert "host 1 came again, as another pod" in capsys.readouterr().err


@in_loop
async def test_an_old_host_0_leaves():
    meeting = Meeting(2)
    meeting.come(0, generation=3)
    meeting.come(1, generation=5, within=2)
    old, other = await meeting.found()
    assert "host 1 comes from generation 5, this host 0 from an older one (3)" in str(old)
    assert isinstance(other, PeerLost)


@in_loop
async def test_a_pod_of_another_start_is_turned_away(capsys):
    meeting = Meeting(2)
    meeting.come(0)
    meeting.come(1, start="an earlier one", within=1)
    assert isinstance(await meeting.tasks[1], PeerLost)
    meeting.come(1)
    await meeting.met()
    assert "another start of this job (an earlier one)" in capsys.readouterr().err


def hello(**said):
    return json.dumps(dataclasses.asdict(HELLO) | said).encode() + b"\n"


@pytest.mark.parametrize(
    "words",
    [
        b"[" * 4000 + b"\n",
        b"\xff\xfe\n",
        hello(index=0),
        hello(index=float("inf")),
        hello(generation=MOST),
        hello(generation=True),
        hello(more=2),
        hello(start="b\n: done\x1b[2J"),
        b"x" * 10_000,
        b"",
    ],
)
@in_loop
async def test_nothing_that_a_stranger_says_ends_a_meeting(words, capsys):
    meeting = Meeting(2)
    meeting.come(0)
    async with meeting.connection(words) as reader:
        if words:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
        meeting.come(1)
        await meeting.met()
    assert capsys.readouterr().err.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"[" * 100_000 + b"\n", "another program answers there"),
        (b"\xff\n", "another program answers there"),
        (b'{"go": true, "port": 1, "generation": -1}\n', "another program answers there"),
        (b'{"code": 2}\n', "rejected this one"),
        (b'{"code": 76, "reason": "taken"}\n', "^taken$"),
        (b"x", "waited 1 s for"),
        (b"", "where a program listens"),
    ],
)
def test_nothing_that_another_program_answers_holds_a_host(answer, said):
    async def serve(_, writer):
        with contextlib.suppress(OSError):
            while True:
                writer.write(answer)
                await asyncio.sleep(0.3)

    async def run():
        meeting = Meeting(2)
        async with await asyncio.start_server(serve, "127.0.0.1", meeting.port):
            with pytest.raises((InputError, PeerLost), match=said):
                await meeting.host(1, within=1).meet()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"hosts": 4}, InputError, "host 1 counts 4 hosts, host 0 counts 3: make NAIGN_HOSTS the same"),
        ({"ranks": 7}, Unavailable, "host 1 starts 7 ranks, host 0 starts 1: see whether a GPU is missing"),
    ],
)
@in_loop
async def test_hosts_that_count_differently_all_end(changed, kind, said):
    meeting = Meeting()
    meeting.come(0)
    meeting.come(2)
    await asyncio.sleep(0.3)
    meeting.come(1, **changed)
    for error in await meeting.found():
        assert isinstance(error, kind) and said in str(error)


@in_loop
async def test_who_waits_for_nobody_gives_up():
    meeting = Meeting(2)
    async with meeting.host(0, within=0.1) as first:
        with pytest.raises(PeerLost, match="waited 0 s for host 1 of 2"):
            await first.meet()
    with pytest.raises(PeerLost, match="host 0"):
        await meeting.host(1, within=0.1).meet()


def test_a_taken_port_is_told():
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="choose another --port"):
        listen(taken.getsockname()[1])


@in_loop
async def test_the_end_of_a_host_is_told_to_the_others():
    meeting = Meeting()
    for index in range(3):
        meeting.come(index)
    first, second, third = await meeting.found()
    second.leave(PEER_LOST, lost=True)
    await module.wait_for(lambda: first.codes, 5)
    first.leave(BAD_INPUT, lost=False)  # also to the one that has left
    await module.wait_for(lambda: second.codes and third.codes, 5)
    third.close()  # as the system does for a process that is killed
    await module.wait_for(lambda: len(first.codes) == 2, 5)
    assert first.codes == {1: PEER_LOST, 2: None} and first.lost
    assert second.codes == third.codes == {0: BAD_INPUT} and not third.lost


def linked():
    """A host that is connected to another one."""
    return Links(Answer(generation=1), "", {1: None})


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (End(PEER_LOST, lost=False), FAILED),
        (End(FAILED, lost=False), FAILED),
        (End(PEER_LOST, lost=True), PEER_LOST),
        (None, PEER_LOST),
    ],
)
@in_loop
async def test_a_crash_counts_unless_a_host_vanished(end, expected):
    links = linked()
    asyncio.get_running_loop().call_later(0.3, links.note, 1, end)  # after this host's ranks have ended
    for code, judged in ((FAILED, expected), (BAD_INPUT, BAD_INPUT), (DONE, DONE)):
        assert await links.judge(code, killed=False, asked=False) == judged


@pytest.mark.parametrize(
    ("killed", "asked", "alone"),
    [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ],
)
@in_loop
async def test_who_was_killed_or_is_asked_to_end_or_is_alone_waits_for_nobody(killed, asked, alone):
    links = Links(Answer(), "", {}) if alone else linked()
    begun = time.monotonic()
    assert await links.judge(FAILED, killed=killed, asked=asked) == FAILED
    assert time.monotonic() - begun < module.GRACE / 2
    assert not alone or not links.may_meet_again(PEER_LOST)


@in_loop
async def test_bad_input_of_another_host_goes_before_its_loss():
    links = linked()
    links.note(1, End(BAD_INPUT, lost=False))
    assert await links.judge(PEER_LOST, killed=False, asked=False) == BAD_INPUT


def test_ranks_have_less_time_to_end_after_a_loss():
    links = linked()
    assert links.time_left(60) == float("inf")
    links.note(1, End(FAILED, lost=False))
    assert 50 < links.time_left(60) < 61
    links.note(2, None)
    assert links.time_left(60) < 1


@pytest.mark.parametrize(
    ("code", "again"),
    [
        (PEER_LOST, True),
        (INTERRUPTED, True),
        (DONE, False),
        (BAD_INPUT, False),
        (FAILED, False),
    ],
)
def test_who_meets_again(code, again):
    assert linked().may_meet_again(code) == again


@pytest.mark.parametrize(("seconds", "tried"), [(660.0 + 30, LIMIT), (LONG + 661, LIMIT + 3)])
def test_starts_that_end_early_are_not_tried_for_ever(seconds, tried, monkeypatch):
    """Also where ranks waited for each other in vain, because ports are blocked: for train.timeout and a minute."""

    async def run():
        meeting = Meeting(2)
        async with meeting.host(0) as first, meeting.host(1) as second:
            for number in range(LIMIT + 3):
                found = await asyncio.gather(first.meet(), second.meet())
                for host, links in zip((first, second), found, strict=True):
                    links.close()
                    try:
                        host.note_training(links, seconds, timeout=660)
                    except Unavailable as error:
                        assert "no host was lost" in str(error)
                        return number + 1
        return LIMIT + 3

    assert asyncio.run(run()) == tried


def test_starts_after_a_loss_are_always_tried_again():
    links = linked()
    links.lost = True
    for _ in range(LIMIT + 3):
        Meeting(2).host(0).note_training(links, 30, timeout=660)


@in_loop
async def test_the_interface_towards_the_others():
    meeting = Meeting(2)
    meeting.come(0)
    meeting.come(1)
    for links in await meeting.met():
        assert links.interface() == "lo"
