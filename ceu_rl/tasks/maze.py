"""Shortest paths through a small maze, answered in moves.

The question is a grid of `SIZE` rows: `S` is the start, `G` the goal, `#` a wall. The answer is a shortest path, in
moves up, down, left and right. Here `DLDLD` is the only one:

    ##.S/.#../...#/#G..

Often there are several right answers, and finding one takes a look ahead, so that a small model is often wrong even
when greedy. A corrupted answer has exactly one move changed, and is wrong.
"""

import random
import re
from collections import deque
from zlib import crc32

from ceu_rl.tasks.protocol import Example, Messages, Task, last_content

SIZE = 4
WALLS = 5
MIN_MOVES, MAX_MOVES = 3, 9
TEST_SHARE = 16  # one maze in 16 belongs to the test split
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}

Cell = tuple[int, int]


def distances(maze: str) -> dict[Cell, int]:
    """Number of moves from each cell that can reach the goal to the goal."""
    cells = {(row, column): mark for row, line in enumerate(maze.split("/")) for column, mark in enumerate(line)}
    goal = next(cell for cell, mark in cells.items() if mark == "G")
    found, queue = {goal: 0}, deque([goal])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES.values():
            cell = (row + down, column + right)
            if cells.get(cell, "#") != "#" and cell not in found:
                found[cell] = found[row, column] + 1
                queue.append(cell)
    return found


def start_of(maze: str) -> Cell:
    return divmod(maze.replace("/", "").index("S"), SIZE)


def shortest_path(maze: str, rng: random.Random) -> str:
    """One of the shortest paths from start to goal; at each cell the next move is drawn uniformly."""
    to_goal, (row, column), path = distances(maze), start_of(maze), ""
    while left := to_goal[row, column]:
        nearer = [
            move for move, (down, right) in MOVES.items() if to_goal.get((row + down, column + right), left) < left
        ]
        path += rng.choice(nearer)
        down, right = MOVES[path[-1]]
        row, column = row + down, column + right
    return path


def is_shortest_path(maze: str, moves: str) -> bool:
    """Whether the moves lead from start to goal, through no wall, in as few moves as can be."""
    to_goal, (row, column) = distances(maze), start_of(maze)
    for move in moves:
        down, right = MOVES.get(move, (0, 0))
        left, (row, column) = to_goal[row, column], (row + down, column + right)
        if to_goal.get((row, column), left) >= left:
            return False
    return to_goal[row, column] == 0


def is_correct(prompt: str | Messages, completion: str | Messages) -> bool:
    """Whether the completion is a shortest path of the maze, and nothing else.

    Both arguments are text or a message list, of which the last message counts.

    Raises:
        ValueError: if the prompt is not a question of this task.
    """
    maze = last_content(prompt)
    row = f"[.#SG]{{{SIZE}}}"
    if not re.fullmatch(f"{row}(/{row}){{{SIZE - 1}}}", maze) or (maze.count("S"), maze.count("G")) != (1, 1):
        raise ValueError(
            f"{maze!r} is no maze: use {SIZE} rows of {SIZE} of '.#SG' joined by '/', with one S and one G."
        )
    if start_of(maze) not in distances(maze):
        raise ValueError(f"{maze!r} has no path from S to G; use a maze that has one.")
    return is_shortest_path(maze, last_content(completion))


def corrupt(maze: str, path: str, rng: random.Random) -> str:
    """Change one move, uniformly over those changes that make the path wrong."""
    changed = [
        path[:place] + move + path[place + 1 :] for place in range(len(path)) for move in MOVES if move != path[place]
    ]
    return rng.choice([moves for moves in changed if not is_shortest_path(maze, moves)])


def add_errors(path: str, error_rate: float, rng: random.Random) -> str:
    """Replace each move, independently, with probability `error_rate` by another one."""
    return "".join(
        rng.choice([other for other in MOVES if other != move]) if rng.random() < error_rate else move for move in path
    )


def make_examples(split: str, count: int, error_rate: float, seed: int) -> list[Example]:
    """Draw `count` distinct mazes of `split` ("train" or "test"), whose shortest paths have `MIN_MOVES` to `MAX_MOVES`.

    A maze belongs to test or to train once for all, by its checksum.
    """
    rng, errors = random.Random(f"{split} {seed}"), random.Random(f"{split} {seed} errors")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        marks = ["S", "G", *"#" * WALLS, *"." * (SIZE**2 - WALLS - 2)]
        rng.shuffle(marks)
        maze = "/".join("".join(marks[row * SIZE : (row + 1) * SIZE]) for row in range(SIZE))
        is_test = crc32(maze.encode()) % TEST_SHARE == 0
        moves = distances(maze).get(start_of(maze), 0)
        if is_test != (split == "test") or maze in examples or not MIN_MOVES <= moves <= MAX_MOVES:
            continue
        answer = shortest_path(maze, rng)
        examples[maze] = Example(maze, answer, corrupt(maze, answer, rng), add_errors(answer, error_rate, errors))
    return list(examples.values())


def accuracy(prompts: list[str | Messages], completions: list[str | Messages], **kwargs: object) -> list[float]:
    """The verifier as a reward function for GRPO: 1 for a shortest path, else 0."""
    return [float(is_correct(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)]


TASK = Task(
    name="builtin:maze",
    configs={"clean": 0.0},
    make_examples=make_examples,
    is_correct=is_correct,
    max_new_tokens=MAX_MOVES + 1,
)
