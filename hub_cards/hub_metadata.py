"""What the Hub's metadata take, checked before anything is written: names, licences, languages."""

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
    c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
    """.split()
)
# ISO 639-1 to 639-3, or the words that the Hub takes in their place.
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")


def check_metadata(
    *,
    repo=None,
    base_model=None,
    license=None,
    license_name=None,
    license_link=None,
    language=None,
    datasets=None,
):
    """Refuse what the Hub would refuse, or show as unknown.

    Args:
        repo, base_model (`str`, *optional*): Hub ids of the model and of its backbone.
        license (`str`, *optional*): id as the Hub lists them; `"other"` needs `license_name` and `license_link`.
        license_name, license_link (`str`, *optional*): go with `"other"` only.
        language (`str` or `list[str]`, *optional*): ISO 639 codes, `"multilingual"` or `"code"`.
        datasets (`list[str]`, *optional*): Hub ids.

    Raises:
        ValueError: names what was given and what is allowed.
    """
    if repo is not None and repo.count("/") != 1:
        raise ValueError(f"The repository must be named owner/name, got {repo!r}.")
    names = [("repository", repo), ("base_model", base_model), *(("data set", name) for name in datasets or ())]
    for kind, name in names:
        if name is not None:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"The {kind} {name!r} is no Hub id: {error}") from error
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"The licence {license!r} is none that the Hub knows; allowed are {sorted(LICENSES)}, in lower case. For "
            "any other give 'other', its license_name and its license_link."
        )
    if {license_name is not None, license_link is not None} != {license == "other"}:
        raise ValueError(
            f"license='other', license_name and license_link belong together, got {license!r}, {license_name!r} and "
            f"{license_link!r}."
        )
    for code in [language] if isinstance(language, str) else language or ():
        if not LANGUAGE.fullmatch(code):
            raise ValueError(f"The language {code!r} is no ISO 639 code such as 'en', nor 'multilingual' or 'code'.")
