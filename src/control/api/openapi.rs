//! `docs/openapi.json`, made of the routes and of the structs they speak in, and held to them.
//!
//! `PCACHE_WRITE_OPENAPI=1 cargo test --lib openapi` writes it anew.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

use super::model::*;
use super::{Body, Kind, ROUTES, Route};

/// Enters a struct under its name; none is left out unnoticed, since every reference is looked up.
macro_rules! schemas {
    ($generator:ident: $($name:ident),*) => { $( $generator.subschema_for::<$name>(); )* };
}

fn definitions() -> Map<String, Value> {
    let mut generator = SchemaGenerator::new(SchemaSettings::openapi3());
    schemas!(generator: DaemonStatus, Volumes, VolumeStatus, Stats, VolumeStats, AttachRequest, SetRequest, Job,
        ResizeRequest, CheckpointRequest, Checkpoint, Jobs, ReloadReport, Refusal);
    generator.take_definitions(true)
}

fn content(body: Body) -> Option<Value> {
    Some(match body {
        Body::Nothing => return None,
        Body::Json(name) => {
            json!({ "application/json": { "schema": { "$ref": format!("#/components/schemas/{name}") } } })
        }
        Body::Text(media_type) => json!({ media_type: { "schema": { "type": "string" } } }),
    })
}

fn parameters(route: &Route) -> Vec<Value> {
    let in_path = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = in_path.map(|name| {
        let schema = match name {
            "job" => json!({ "type": "integer", "minimum": 1 }),
            _ => json!({ "type": "string", "pattern": "^[a-z0-9_][a-z0-9_-]{0,63}$" }),
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    let in_query = route.parameters.iter().map(|(name, choices, about)| {
        let schema = match choices {
            [] => json!({ "type": "integer", "minimum": 1 }),
            choices => json!({ "type": "string", "enum": choices }),
        };
        json!({ "name": name, "in": "query", "description": about, "schema": schema })
    });
    in_path.chain(in_query).collect()
}

fn operation(route: &Route) -> Value {
    let mut responses = Map::new();
    let said = if route.status == 202 { "It has begun: the job to follow" } else { "Done" };
    let mut success = json!({ "description": said });
    if let Some(content) = content(route.gives) {
        success["content"] = content;
    }
    responses.insert(route.status.to_string(), success);
    let refusal =
        json!({ "description": "Refused, with a sentence", "content": content(Body::Json("Refusal")) });
    responses.insert("default".into(), refusal);
    let mut operation = json!({ "summary": route.summary, "responses": responses });
    let parameters = parameters(route);
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(content) = content(route.takes) {
        operation["requestBody"] = json!({ "required": true, "content": content });
    }
    operation
}

fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "pcache-vhost control API",
            "version": "1",
            "description": "HTTP on the daemon's control socket (--control PATH): \
                `curl --unix-socket PATH http://localhost/v1/status`. Long work is a job: the answer is its \
                number, GET /v1/jobs/{job} says how far it is, DELETE calls it off.",
            "license": { "name": "Apache-2.0" },
        },
        "paths": paths,
        "components": { "schemas": definitions() },
    })
}

#[test]
fn the_document_says_what_the_code_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
    let made = format!("{:#}\n", document());
    if std::env::var_os("PCACHE_WRITE_OPENAPI").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap();
    assert!(kept == made, "docs/openapi.json is not what the code does: see the head of api/openapi.rs");
}

#[test]
fn every_reference_of_the_document_leads_somewhere_and_everything_has_a_description() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let mut references = Vec::new();
    let mut todo = vec![&document];
    while let Some(value) = todo.pop() {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref") {
                    references.push(reference.strip_prefix("#/components/schemas/").unwrap().to_owned());
                }
                todo.extend(map.values());
            }
            Value::Array(values) => todo.extend(values),
            _ => {}
        }
    }
    assert!(references.len() > ROUTES.len());
    for reference in references {
        let schema = &schemas[&reference];
        assert!(schema["description"].is_string(), "{reference}: {schema}");
        for (field, about) in schema["properties"].as_object().unwrap() {
            let is_told = about["description"].is_string() || about["$ref"].is_string();
            assert!(is_told || about["allOf"].is_array(), "{reference}.{field}: {about}");
        }
    }
    for kind in
        [Kind::BadRequest, Kind::NotFound, Kind::NotAllowed, Kind::Conflict, Kind::TooLarge, Kind::Failed]
    {
        let about = schemas["Refusal"]["properties"]["kind"]["description"].as_str().unwrap();
        assert!(about.contains(kind.word()), "{} is not told of", kind.word());
        assert!((400..600).contains(&kind.status()));
    }
}
