"""Requests generated from the OpenAPI schema: none causes a server error."""

from collections.abc import Callable

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from softprompt.serve import Engine
from softprompt.serve.api.app import make_app
from softprompt.serve.api.auth import AuthConfig

SETTINGS = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_generated_requests_cause_no_server_error(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(prompts=1, max_new_tokens=8)
    app = make_app(engine, AuthConfig(tokens=("sesame",)))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations: set[str] = set()
    statuses: set[int] = set()

    def ask(case: schemathesis.Case) -> None:
        operations.add(f"{case.method} {case.operation.path}")
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "p0"
        response = case.call(headers={"Authorization": "Bearer sesame"})
        statuses.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    for result in schema.get_all_operations():
        operation = result.ok()
        # Any text is a name and any bytes a file: only JSON can be wrong by its schema.
        wrong = [GenerationMode.NEGATIVE] if "json" in str(operation.get_request_payload_content_types()) else []
        for mode in (GenerationMode.POSITIVE, *wrong):
            SETTINGS(given(operation.as_strategy(mode))(ask))()
    assert {"POST /v1/completions", "POST /v1/classify", "PUT /v1/prompts/{name}"} <= operations
    assert {200, 400} <= statuses
