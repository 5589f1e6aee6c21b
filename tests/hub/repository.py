"""A bare git repository as the Hub keeps one: read by commit, written one commit at a time."""

import subprocess
from pathlib import Path

# Commits depend on their content alone: the same trees, published in the same order, have the same hashes.
AUTHOR = "Hub <hub@localhost> 1767225600 +0000"


class Repository:
    """Branches, commits and files below ``path``."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path) -> "Repository":
        """A new repository; like the Hub's, its first commit holds a .gitattributes."""
        subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(path)], check=True)
        repository = cls(path)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs -text\n"}, [])
        return repository

    def branches(self) -> dict[str, str]:
        """{branch: commit}"""
        lines = self._git("for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/heads").splitlines()
        return dict(line.split() for line in lines)

    def resolve(self, revision: str) -> str:
        """The commit that a branch or an abbreviated or full hash names.

        Raises:
            KeyError: none does.
        """
        return self._object(f"{revision}^{{commit}}")

    def entries(self, commit: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders in ``folder``, as the Hub's tree endpoint lists them.

        Raises:
            KeyError: there is no such folder.
        """
        tree = self._object(f"{commit}:{folder}")
        found = []
        for line in self._git("ls-tree", "-l", "-z", *(["-r", "-t"] if recursive else []), tree).split("\0")[:-1]:
            info, name = line.split("\t", 1)
            _, kind, oid, size = info.split()
            path = f"{folder}/{name}" if folder else name
            sizes = {"type": "file", "size": int(size)} if kind == "blob" else {"type": "directory", "size": 0}
            found.append({"path": path, "oid": oid, **sizes})
        return found

    def read(self, commit: str, path: str) -> tuple[str, bytes]:
        """A file's object id and content.

        Raises:
            KeyError: there is no such file.
        """
        oid = self._object(f"{commit}:{path}")
        return oid, self._run("cat-file", "blob", oid).stdout

    def branch(self, name: str, start: str) -> None:
        """Creates a branch at ``start``."""
        self._git("update-ref", f"refs/heads/{name}", self.resolve(start))

    def commit(self, branch: str, message: str, files: dict[str, bytes], deleted: list[str]) -> str:
        """Adds a commit on top of ``branch`` that writes and deletes files, and returns its hash."""
        stream = [f"commit refs/heads/{branch}\ncommitter {AUTHOR}\n".encode(), _data(message.encode())]
        if branch in self.branches():
            stream.append(f"from refs/heads/{branch}^0\n".encode())
        stream += (f"D {path}\n".encode() for path in deleted)
        for path, content in files.items():
            stream += (f"M 100644 inline {path}\n".encode(), _data(content))
        subprocess.run(["git", "-C", str(self.path), "fast-import", "--quiet"], input=b"".join(stream), check=True)
        return self.branches()[branch]

    def _object(self, name: str) -> str:
        run = self._run("rev-parse", "--verify", "--quiet", name, check=False)
        if run.returncode:
            raise KeyError(name)
        return run.stdout.decode().strip()

    def _git(self, *arguments: str) -> str:
        return self._run(*arguments).stdout.decode()

    def _run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(self.path), *arguments], capture_output=True, check=check)


def _data(content: bytes) -> bytes:
    return f"data {len(content)}\n".encode() + content + b"\n"
