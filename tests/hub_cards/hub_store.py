"""What the Hub keeps: repositories with commits, branches and tags, and blobs by their content's hash."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# What the Hub's own .gitattributes says of the files in these tests; larger files are LFS whatever their name.
LFS_SUFFIXES = {".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".png", ".jpg"}
LARGEST_REGULAR = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()


class HubError(Exception):
    """An answer that is no success: status, the Hub's error code, its message."""

    def __init__(self, status, code=None, message="", body=None):
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


def git_hash(content):
    """Return the git object id of bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: git object id, size of the content, and its sha256 where it is an LFS file."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def remote_oid(self):
        return self.sha256 or self.oid

    def describe(self, path):
        """Return what the tree and paths-info endpoints say."""
        described = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256 is not None:
            described["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return described


@dataclass
class Repository:
    """Commits by hash as `{path: Entry}`, their messages in order, branches and tags."""

    name: str
    type: str
    private: bool
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    lfs: set = field(default_factory=set)

    def resolve(self, revision):
        """Return the commit of a branch, tag or hash."""
        for found in (self.branches.get(revision), self.tags.get(revision), revision):
            if found in self.commits:
                return found
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def entry(self, revision, path):
        """Return the commit and the file of a revision."""
        commit = self.resolve(revision)
        if path not in self.commits[commit]:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return commit, self.commits[commit][path]

    def listing(self, revision, folder, recursive):
        """Return files and folders below a folder, as the tree endpoint says them."""
        commit = self.resolve(revision)
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(self.commits[commit]) if path.startswith(prefix)]
        if folder and not paths:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        found = {path: self.commits[commit][path].describe(path) for path in paths}
        for path in paths:
            for parent in map(str, PurePosixPath(path).parents):
                if parent.startswith(prefix) and parent != ".":
                    found[parent] = {"type": "directory", "path": parent, "size": 0, "oid": git_hash(parent.encode())}
        if not recursive:
            found = {path: told for path, told in found.items() if "/" not in path.removeprefix(prefix)}
        return [found[path] for path in sorted(found)]


class HubStore:
    """All repositories, and a folder of blobs named by their hash (`root`, a `Path`)."""

    def __init__(self, root):
        self.root = root
        self.repositories = {}
        self._lock = threading.Lock()

    def blob(self, name):
        return self.root / name

    def find(self, repo_type, name, token):
        """Return a repository that a token may see; without a token the Hub does not tell private from missing."""
        found = self.repositories.get((repo_type, name))
        if found is not None and (not found.private or token):
            return found
        if token:
            raise HubError(404, "RepoNotFound", "Repository not found")
        # With the code, as the client knows the Hub's bare 401 only from addresses of https.
        raise HubError(401, "RepoNotFound", "Invalid username or password.")

    def create(self, repo_type, name, private):
        with self._lock:
            if (repo_type, name) in self.repositories:
                raise HubError(409, None, "You already created this model repo")
            repository = self.repositories[repo_type, name] = Repository(name, repo_type, private)
            self.blob(git_hash(GITATTRIBUTES)).write_bytes(GITATTRIBUTES)
            entries = {".gitattributes": Entry(git_hash(GITATTRIBUTES), len(GITATTRIBUTES))}
            self._commit(repository, "main", entries, "initial commit")

    def _commit(self, repository, branch, entries, message):
        listed = json.dumps({path: entry.remote_oid for path, entry in sorted(entries.items())})
        parent = repository.branches.get(branch, "")
        commit = hashlib.sha1(f"{repository.name}\n{parent}\n{message}\n{listed}".encode()).hexdigest()
        repository.commits[commit] = entries
        repository.messages.append((branch, message))
        repository.branches[branch] = commit
        return commit

    def commit(self, repository, branch, parent, message, changes):
        """Apply added files (`Entry`) and deletions (None), by path; a path that ends in / is a folder."""
        with self._lock:
            if branch not in repository.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            head = repository.branches[branch]
            if parent is not None and parent != head:
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            entries = dict(repository.commits[head])
            for path, entry in changes:
                if entry is not None:
                    entries[path] = entry
                elif path.endswith("/"):
                    entries = {name: kept for name, kept in entries.items() if not name.startswith(path)}
                elif entries.pop(path, None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            return self._commit(repository, branch, entries, message)


def upload_mode(path, size):
    """Return "lfs" or "regular"."""
    return "lfs" if PurePosixPath(path).suffix in LFS_SUFFIXES or size > LARGEST_REGULAR else "regular"
