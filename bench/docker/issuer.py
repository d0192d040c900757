"""An issuer of our own: signs tokens as GitHub does, and gives a job its token as GitHub's runner does.

    issuer.py PORT DIRECTORY

Uses openssl for its key. `GET /job?audience=NAME` needs the header `Authorization: bearer runner`, and answers
{"value": token} with the claims of DIRECTORY/claims.json.
"""

import base64
import http.server
import json
import pathlib
import subprocess
import sys
import time
import urllib.parse

PORT, DIRECTORY = int(sys.argv[1]), pathlib.Path(sys.argv[2])
URL = f"http://127.0.0.1:{PORT}"
KEY = DIRECTORY / "issuer.pem"


def openssl(*arguments, given=b""):
    return subprocess.run(["openssl", *arguments], input=given, check=True, capture_output=True).stdout


def text(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def key_set():
    modulus = openssl("rsa", "-in", str(KEY), "-noout", "-modulus").decode().strip().removeprefix("Modulus=")
    key = {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "one", "n": text(bytes.fromhex(modulus)), "e": "AQAB"}
    return {"keys": [key]}


def token(audience):
    now = int(time.time())
    claims = json.loads((DIRECTORY / "claims.json").read_text())
    claims |= {"iss": URL, "aud": audience, "iat": now, "nbf": now - 5, "exp": now + 300}
    header = {"alg": "RS256", "typ": "JWT", "kid": "one"}
    signed = ".".join(text(json.dumps(part).encode()) for part in (header, claims))
    return signed + "." + text(openssl("dgst", "-sha256", "-sign", str(KEY), given=signed.encode()))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        audience = urllib.parse.parse_qs(url.query).get("audience", [""])[0]
        if url.path == "/.well-known/openid-configuration":
            self.answer({"issuer": URL, "jwks_uri": f"{URL}/keys"})
        elif url.path == "/keys":
            self.answer(key_set())
        elif url.path == "/job" and self.headers.get("Authorization") == "bearer runner":
            self.answer({"count": 1, "value": token(audience)})
        else:
            self.send_error(401)

    def answer(self, value):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


openssl("genrsa", "-out", str(KEY), "2048")
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
