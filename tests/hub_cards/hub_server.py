"""A Hub on loopback: the HTTP API that huggingface_hub calls to push and to load, over a folder of blobs.

Uploads go by git LFS, basic or in parts; clients must set HF_HUB_DISABLE_XET=1, as the protocol of Xet storage is not
spoken here. `environment` gives what a client process needs, `connect` makes a client of this one.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants

from tests.hub_cards.hub_store import Entry, HubError, HubStore, git_hash, upload_mode

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
REPO = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<type>models|datasets|spaces)/{REPO}"
PAGES = r"/(?:(?P<type>datasets|spaces)/)?" + REPO
# Signed addresses of storage and of the download network: no token goes there.
SIGNED = r"/(?P<kind>lfs|part|complete|cdn)/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", API + r"/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", API + r"/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", API + r"/refs", "refs"),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", PAGES + r"\.git/info/lfs/objects/batch", "batch"),
    ("POST", PAGES + r"\.git/info/lfs/verify", "verify"),
    ("HEAD", PAGES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", PAGES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("PUT", SIGNED, "put"),
    ("POST", SIGNED, "complete"),
    ("GET", SIGNED, "download"),
    ("HEAD", SIGNED, "download"),
]
ROUTES = [(method, re.compile(pattern), name) for method, pattern, name in ROUTES]


class Hub:
    """The server, in a thread: `with Hub(folder) as hub: ... hub.url, hub.token, hub.requests`.

    Args:
        root (`pathlib.Path`): folder of the blobs.
        page_size (`int`, defaults to 4): entries of a page of the tree.
        part_size (`int`, defaults to 100,000): LFS files that are larger are uploaded in parts of this many bytes.
    """

    def __init__(self, root, page_size=4, part_size=100_000):
        root.mkdir(parents=True, exist_ok=True)
        self.store = HubStore(root)
        self.page_size, self.part_size = page_size, part_size
        self.token, self.signature = "hf_" + secrets.token_hex(8), secrets.token_hex(8)
        # (method, route, path), in order; of storage only what arrived whole.
        self.requests, self.uploads, self.ranges = [], [], []
        # Uploads of these hashes fail, seconds that each upload takes, and whether the next download is cut half way.
        self.refused_uploads, self.upload_seconds, self.cut_download = set(), 0, False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another name of the same server, for what the Hub keeps on other servers: clients drop their token there.
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token=True):
        """Return the environment of a client with an empty home (a `Path`), which does not see this project."""
        removed = ("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HOME")
        environment = {name: value for name, value in os.environ.items() if name not in removed}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1,localhost"}
        return environment | ({"HF_TOKEN": self.token} if token else {})

    def connect(self, patch):
        """Let this process, which was started without a network, be a client (`patch`: a `pytest.MonkeyPatch`)."""
        patch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", self.token)

    def repository(self, name, repo_type="model"):
        return self.store.repositories[repo_type, name]

    def files(self, name, revision="main", repo_type="model"):
        """Return the content of all files of a revision, by path."""
        repository = self.repository(name, repo_type)
        entries = repository.commits[repository.resolve(revision)]
        return {path: self.store.blob(entry.remote_oid).read_bytes() for path, entry in entries.items()}

    def signed(self, kind, oid, **query):
        pairs = "&".join(f"{name}={value}" for name, value in {"signature": self.signature, **query}.items())
        return f"{self.storage_url}/{kind}/{oid}?{pairs}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def _handle(self):
        split = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        self.body_read = False
        matches = ((name, pattern.fullmatch(split.path)) for method, pattern, name in ROUTES if method == self.command)
        name, match = next((found for found in matches if found[1]), ("unknown", None))
        self.hub.requests.append((self.command, name, unquote(split.path)))
        try:
            if match is None:
                raise HubError(404, None, f"No such route: {self.command} {split.path}")
            given = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
            authorization = self.headers.get("Authorization")
            if "kind" in given:
                if authorization is not None or self.query.get("signature") != self.hub.signature:
                    raise HubError(403, None, "Only one auth mechanism allowed")
            elif authorization not in (None, f"Bearer {self.hub.token}"):
                raise HubError(401, None, "Invalid credentials in Authorization header")
            self.authorized = authorization is not None
            if "name" in given:
                repo_type = given.pop("type")
                given["repository"] = self.hub.store.find(
                    TYPES.get(repo_type, "model"), given.pop("name"), self.authorized
                )
            getattr(self, f"on_{name}")(**given)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self.answer(error.body or {"error": error.message}, error.status, headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def body(self):
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("cut off")
        return content

    def answer(self, content=b"", status=200, headers=None):
        if not self.body_read and self.command in ("POST", "PUT"):
            self.body()
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        headers = {"Content-Length": len(content), "X-Request-Id": secrets.token_hex(4), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def need_token(self):
        if not self.authorized:
            raise HubError(401, None, "Invalid username or password.")

    # Account and repositories.

    def on_whoami(self):
        self.need_token()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.answer({"type": "user", "name": "someone", "orgs": [{"name": "org"}], "auth": auth})

    def on_create(self):
        self.need_token()
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if wanted.get("organization") not in (None, "someone", "org"):
            raise HubError(403, None, f"You don't have the rights to create a model under {wanted['organization']}")
        repo_type = wanted.get("type") or "model"
        url = f"{self.hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{name}"
        try:
            self.hub.store.create(repo_type, name, wanted.get("visibility") == "private")
        except HubError as error:
            error.body = {"error": error.message, "url": url}
            raise
        self.answer({"url": url, "name": name})

    def on_validate_yaml(self):
        content = json.loads(self.body())["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            head = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
            raise HubError(400, None, "Invalid metadata", {"errors": errors, "warnings": []}) from error
        warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer({"errors": [], "warnings": warnings})

    def on_info(self, repository, revision):
        commit = repository.resolve(revision or "main")
        files = repository.commits[commit]
        with_blobs = self.query.get("blobs", "").lower() == "true"
        siblings = [
            {"rfilename": path, **({"size": files[path].size, "blobId": files[path].oid} if with_blobs else {})}
            for path in sorted(files)
        ]
        about = {"_id": "0", "id": repository.name, "modelId": repository.name, "sha": commit, "tags": []}
        self.answer({**about, "private": repository.private, "gated": False, "siblings": siblings})

    def on_refs(self, repository):
        def described(refs, kind):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]

        branches, tags = described(repository.branches, "heads"), described(repository.tags, "tags")
        self.answer({"branches": branches, "tags": tags, "converts": []})

    def on_branch(self, repository, revision):
        self.need_token()
        start = repository.resolve(json.loads(self.body() or b"{}").get("startingPoint", "main"))
        if revision in repository.branches:
            raise HubError(409, None, f"Reference already exists: {revision}")
        repository.branches[revision] = start
        self.answer({})

    def on_tag(self, repository, revision):
        self.need_token()
        tag = json.loads(self.body())["tag"]
        if tag in repository.tags:
            raise HubError(409, None, f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.resolve(revision)
        self.answer({})

    def on_tree(self, repository, revision, path):
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = repository.listing(revision, (path or "").strip("/"), recursive)
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        headers = {}
        if end < len(entries):
            base = f"{self.hub.url}{urlsplit(self.path).path}"
            headers["Link"] = f'<{base}?recursive={recursive}&cursor={end}>; rel="next"'
        self.answer(entries[start:end], headers=headers)

    def on_paths_info(self, repository, revision):
        wanted = parse_qs(self.body().decode()).get("paths", [])
        files = repository.commits[repository.resolve(revision)]
        self.answer([files[path].describe(path) for path in wanted if path in files])

    # Uploads.

    def on_preupload(self, repository, revision):
        self.need_token()
        files = repository.commits[repository.resolve(revision)]
        told = []
        for file in json.loads(self.body())["files"]:
            path = file["path"]
            known = {"oid": files[path].remote_oid} if path in files else {}
            told.append({"path": path, "uploadMode": upload_mode(path, file["size"]), "shouldIgnore": False, **known})
        self.answer({"files": told})

    def on_batch(self, repository):
        self.need_token()
        told = []
        for item in json.loads(self.body())["objects"]:
            oid, size = item["oid"], item["size"]
            told.append(dict(item))
            if self.hub.store.blob(oid).is_file():
                continue
            page = "" if repository.type == "model" else f"{repository.type}s/"
            verify = {"href": f"{self.hub.url}/{page}{repository.name}.git/info/lfs/verify"}
            if size <= self.hub.part_size:
                upload = {"href": self.hub.signed("lfs", oid)}
            else:
                num_parts = -(-size // self.hub.part_size)
                parts = {str(i): self.hub.signed("part", oid, number=i) for i in range(1, num_parts + 1)}
                upload = {"href": self.hub.signed("complete", oid)}
                upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
            told[-1]["actions"] = {"upload": upload, "verify": verify}
        self.answer({"transfer": "basic", "objects": told})

    def on_put(self, kind, oid):
        time.sleep(self.hub.upload_seconds)
        if oid in self.hub.refused_uploads:
            raise HubError(403, None, "No room")
        content = self.body()
        if kind == "lfs":
            self._keep(oid, content)
        else:
            self.hub.store.blob(f"{oid}.{int(self.query['number'])}").write_bytes(content)
        self.hub.uploads.append((oid, len(content)))
        self.answer(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def on_complete(self, kind, oid):
        content = b""
        for part in json.loads(self.body())["parts"]:
            piece = self.hub.store.blob(f"{oid}.{part['partNumber']}").read_bytes()
            if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
                raise HubError(400, None, f"Part {part['partNumber']} differs")
            content += piece
        self._keep(oid, content)
        self.answer({})

    def _keep(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, None, "The content is not what its hash says")
        self.hub.store.blob(oid).write_bytes(content)

    def on_verify(self, repository):
        self.need_token()
        item = json.loads(self.body())
        path = self.hub.store.blob(item["oid"])
        if not path.is_file() or path.stat().st_size != item["size"]:
            raise HubError(404, None, "The object was not uploaded")
        self.answer({})

    def on_commit(self, repository, revision):
        self.need_token()
        header, changes = {}, []
        for line in self.body().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                self.hub.store.blob(git_hash(content)).write_bytes(content)
                changes.append((value["path"], Entry(git_hash(content), len(content))))
            elif key == "lfsFile":
                blob = self.hub.store.blob(value["oid"])
                if not blob.is_file():
                    raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n".encode()
                changes.append((value["path"], Entry(git_hash(pointer), blob.stat().st_size, value["oid"])))
            elif key in ("deletedFile", "deletedFolder"):
                path = value["path"]
                changes.append((path if key == "deletedFile" else path.rstrip("/") + "/", None))
            else:
                raise HubError(400, None, f"Unknown operation {key}")
        commit = self.hub.store.commit(repository, revision, header.get("parentCommit"), header["summary"], changes)
        page = "" if repository.type == "model" else f"{repository.type}s/"
        url = f"{self.hub.url}/{page}{repository.name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # Downloads.

    def on_resolve(self, repository, revision, path):
        commit, entry = repository.entry(revision, path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry.sha256 is None:
            self._send_file(self.hub.store.blob(entry.oid), {**headers, "ETag": f'"{entry.oid}"'})
            return
        headers |= {"X-Linked-Size": entry.size, "X-Linked-ETag": f'"{entry.sha256}"'}
        headers["Location"] = self.hub.signed("cdn", entry.sha256)
        self.answer(b"Found. Redirecting", 302, headers)

    def on_download(self, kind, oid):
        self._send_file(self.hub.store.blob(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, may_cut=True)

    def _send_file(self, path, headers, may_cut=False):
        content, status = path.read_bytes(), 200
        if given := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(given[1]), int(given[2] or len(content) - 1)
            if start >= len(content):
                raise HubError(416, None, "Range not satisfiable")
            headers |= {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
            self.hub.ranges.append((path.name, start))
        if may_cut and self.hub.cut_download and self.command == "GET":
            self.hub.cut_download = False
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.answer(content, status, headers)
