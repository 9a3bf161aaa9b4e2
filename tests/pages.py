"""Reports as tests read them."""

import base64
import io
import json
import re
from html.parser import HTMLParser

from PIL import Image


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, the marked numbers, and the ids of sections in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.numbers, self._open = [], [], None
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self._open = dict(attributes)

    def handle_data(self, text):
        if self._open is not None:
            self.numbers.append((self._open["data-name"], self._open["value"], text))
            self._open = None

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self, alt=""):
        """The decoded images whose description begins so."""
        found = [a["src"] for a in self.of("img") if a["alt"].startswith(alt)]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in found]

    def check_alone(self):
        """It loads nothing from anywhere, and no two elements have one id.

        HTML: what loads is in src, href, srcset, poster, data, CSS url() and @import; all must be data URIs or #ids.
        """
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed")
            for name in ("src", "srcset", "href", "xlink:href", "poster", "data", "action"):
                loaded = attributes.get(name) or "#"
                assert re.match(r"data:(image/(png|gif)|audio/wav);base64,|#", loaded), (tag, name)
        assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", self.source))
        assert "@import" not in self.source
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))


def written(run):
    """The numbers of a run's report."""
    return json.loads((run.folder / "report.json").read_text("utf-8"))
