"""Two tiers under LRU once more, plainly: a list of users and a count of tokens. What the simulation is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tier:
    """The users with states here, whose did not come up for longest first, and how many tokens of each."""

    pages: int
    page_tokens: int
    order: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    evicted_pages: int = 0

    def of(self, user: str) -> int:
        return self.tokens.get(user, 0)

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def free(self) -> int:
        return self.pages - sum(map(self.pages_of, self.tokens.values()))

    def renew(self, user: str) -> None:
        if user in self.order:
            self.order.remove(user)
            self.order.append(user)

    def put(self, user: str, tokens: int) -> None:
        if user in self.order:
            self.order.remove(user)
            del self.tokens[user]
        if tokens:
            self.order.append(user)
            self.tokens[user] = tokens

    def make_room(self, user: str, pages: int) -> int:
        """Take pages of others, from their tails, until `user` could have `pages`; tokens that it has room for then."""
        own = self.pages_of(self.of(user))
        for victim in [other for other in self.order if other != user]:
            shortfall = pages - own - self.free()
            if shortfall <= 0:
                break
            held = self.pages_of(self.tokens[victim])
            taken = min(held, shortfall)
            self.evicted_pages += taken
            self.tokens[victim] = min(self.tokens[victim], (held - taken) * self.page_tokens)
            if not self.tokens[victim]:
                self.put(victim, 0)
        return min(pages, own + self.free()) * self.page_tokens


class TierModel:
    """Serves one request after the other; a user's states are all of one generation."""

    def __init__(self, page_tokens: int, gpu_pages: int, host_pages: int) -> None:
        self.gpu, self.host = Tier(gpu_pages, page_tokens), Tier(host_pages, page_tokens)
        self.generations: dict[str, int] = {}

    def request(self, user: str, tokens: int, generation: int, after: tuple[int, int]) -> tuple[int, int]:
        """Prefix tokens found on the GPU and on the host; `after`: tokens and generation when the request is over."""
        same = self.generations.get(user, generation) == generation
        present = min(self.gpu.of(user), tokens) if same else 0
        loaded = self._load(user, tokens) if same else 0
        cached = self._encode(user, tokens, generation)
        found = (present, cached - present) if loaded else (cached, 0)
        if after[1] != generation and min(tokens, max(self.gpu.of(user), self.host.of(user))):
            self._encode(user, *after)
        return found

    def _load(self, user: str, tokens: int) -> int:
        self._renew(user)
        target = min(self.host.of(user), tokens)
        if target <= self.gpu.of(user):
            return 0
        target = min(target, self.gpu.make_room(user, self.gpu.pages_of(tokens)))
        if target <= self.gpu.of(user):
            return 0
        self.gpu.put(user, target)
        return target

    def _encode(self, user: str, tokens: int, generation: int) -> int:
        if tokens:  # a prefix without tokens contradicts nothing
            if self.generations.get(user, generation) != generation:
                self.gpu.put(user, 0)
                self.host.put(user, 0)
            self.generations[user] = generation
        self._renew(user)
        cached = self.gpu.of(user)
        room = self.gpu.make_room(user, self.gpu.pages_of(tokens))
        self.gpu.put(user, max(cached, min(tokens, room)))
        made, saved = self.gpu.of(user), self.host.of(user)
        if made > saved:
            self.host.put(user, max(saved, min(made, self.host.make_room(user, self.host.pages_of(made)))))
        return min(cached, tokens)

    def _renew(self, user: str) -> None:
        self.gpu.renew(user)
        self.host.renew(user)
