//! Two agents: what was put comes back as it was.

use std::path::Path;
use std::process::Command;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, clean};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Two agents, the second known to the first.
fn pair(folder: &Path) -> (Agent, Agent) {
    let b = Agent::start(folder, "b", &[]);
    let a = Agent::start(folder, "a", &[&b.as_peer()]);
    (a, b)
}

fn kinds() -> Vec<Tensor> {
    let kinds = [
        ("F64", 8),
        ("F32", 4),
        ("F16", 2),
        ("BF16", 2),
        ("I64", 8),
        ("I32", 4),
        ("I16", 2),
        ("I8", 1),
        ("U64", 8),
        ("U32", 4),
        ("U16", 2),
        ("U8", 1),
        ("BOOL", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("C64", 8),
    ];
    let mut tensors = Vec::new();
    for (dtype, size) in kinds {
        let name = format!("layer.{dtype}/重み");
        let bytes = model::noise(size as u64, 3 * 5 * size);
        tensors.push(Tensor {
            name,
            dtype,
            shape: vec![3, 5],
            bytes,
        });
    }
    tensors.push(Tensor {
        name: "none".into(),
        dtype: "F32",
        shape: vec![4, 0, 2],
        bytes: vec![],
    });
    let scalar = model::noise(9, 8);
    tensors.push(Tensor {
        name: "scalar".into(),
        dtype: "F64",
        shape: vec![],
        bytes: scalar,
    });
    tensors
}

#[test]
fn every_type_and_shape_and_the_metadata_come_back_over_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let mut tensors = kinds();
    tensors.push(Tensor::bytes("large", (3 << 20) + 17));
    model::write(
        &file,
        &tensors,
        &[("format", "pt"), ("author", "Zoë"), ("empty", "")],
    );

    let put = a.json(&["put", text(&file), "b:model"]);
    let got = a.json(&["get", "b:model", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));

    let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    for moved in [&put, &got] {
        assert_eq!(moved["tensors"], tensors.len());
        assert_eq!(moved["bytes"], bytes);
        assert_eq!(moved["path"], "tcp");
        assert_eq!(moved["reasons"], Value::Array(vec![]));
        assert_eq!(
            moved["copies_per_byte"], 0.0,
            "the kernel alone copies: {moved}"
        );
        assert_eq!(moved["copies"]["kernel"], 2 * bytes, "once in, once out");
    }
    assert_eq!(put["digest"], got["digest"]);
    assert_ne!(put["digest"], "crc32c:00000000");
    let store = &b.status()["store"];
    assert_eq!(store["tensors"], tensors.len());
}

#[test]
fn a_file_of_pythons_library_comes_back_as_python_wrote_it() {
    let Some(python) = std::env::var_os("GENIE_PYTHON") else {
        println!(
            "skipped: no Python with safetensors (scripts/setup makes one; GENIE_PYTHON names it)"
        );
        return;
    };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let (file, back) = (
        folder.path().join("py.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let script = |name: &str, args: &[&Path]| {
        let mut command = Command::new(&python);
        clean(&mut command);
        let output = command
            .arg(fixtures.join(name))
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    script("make_safetensors.py", &[&file]);
    a.json(&["put", text(&file), "b:py"]);
    a.json(&["get", "b:py", text(&back)]);
    script("verify.py", &[&file, &back]);
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&file).unwrap());
}

#[test]
fn ten_thousand_tiny_tensors_make_the_trip() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let tensors: Vec<Tensor> = (0..10_000)
        .map(|i| Tensor::bytes(&format!("block.{i}.bias"), i % 131))
        .collect();
    model::write(&file, &tensors, &[]);
    assert_eq!(a.json(&["put", text(&file), "b:tiny"])["tensors"], 10_000);
    assert_eq!(a.json(&["ls", "b"]).as_array().unwrap().len(), 10_000);
    assert_eq!(a.json(&["get", "b:tiny", text(&back)])["tensors"], 10_000);
    assert_eq!(model::read(&back), model::read(&file));
}

#[test]
fn a_file_without_tensors_is_a_batch_too() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("out.safetensors"),
    );
    model::write(&file, &[], &[("only", "metadata")]);
    assert_eq!(a.json(&["put", text(&file), "b:none"])["bytes"], 0);
    a.json(&["get", "b:none", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
}

#[test]
fn an_agents_own_store_works_without_a_peer() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("out.safetensors"),
    );
    model::write(&file, &kinds(), &[("k", "v")]);
    let put = a.json(&["put", text(&file), "model"]);
    // The name of the node itself means the same.
    let got = a.json(&["get", "a:model", text(&back)]);
    assert_eq!(
        (&put["path"], &got["path"]),
        (&"local".into(), &"local".into())
    );
    assert_eq!(put["copies_per_byte"], 1.0);
    assert_eq!(model::read(&back), model::read(&file));
}

#[test]
fn a_second_put_replaces_the_first_and_rm_gives_the_memory_back() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let file = folder.path().join("m.safetensors");
    model::write(
        &file,
        &[Tensor::bytes("old", 5000), Tensor::bytes("both", 5000)],
        &[],
    );
    a.json(&["put", text(&file), "b:model"]);
    model::write(
        &file,
        &[Tensor::bytes("both", 70), Tensor::bytes("new", 70)],
        &[],
    );
    a.json(&["put", text(&file), "b:model"]);
    let listed = a.json(&["ls", "b"]);
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["model/both", "model/new"]);
    assert_eq!(listed[0]["bytes"], 70);
    assert_eq!(listed[0]["owner"]["Peer"], "a");

    assert_eq!(a.json(&["rm", "b:model/new"])["tensors"], 1);
    assert_eq!(a.json(&["rm", "b:model"])["tensors"], 1);
    let store = &b.status()["store"];
    assert_eq!(
        (&store["tensors"], &store["used_bytes"]),
        (&0.into(), &0.into())
    );
    a.genie(&["rm", "b:model"])
        .assert_fails_with("nothing is stored under \"model\"");
}

#[test]
fn output_is_text_for_people_and_json_for_programs() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let file = folder.path().join("m.safetensors");
    model::write(&file, &[Tensor::bytes("x", 5000)], &[]);
    let put = a.genie(&["put", text(&file), "b:model"]);
    assert!(put.stdout.contains("put 1 tensors, 5.0 kB"), "{put:?}");
    assert_eq!(put.stderr, "", "no progress bar in a pipe");
    assert!(a.genie(&["ls", "b"]).stdout.contains("model/x"));
    assert!(a.genie(&["status"]).stdout.contains("b (dialled) over tcp"));
    let version = a.genie(&["--version"]).stdout;
    assert!(
        version.starts_with("genie 0.") && version.contains("transports: shm, dpdk, tcp"),
        "{version}"
    );
    assert_eq!(a.genie(&["put"]).status.code(), Some(2));
}

#[test]
fn several_programs_use_an_agent_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut files = Vec::new();
    for index in 0..6 {
        let file = folder.path().join(format!("{index}.safetensors"));
        let tensors: Vec<_> = (0..300)
            .map(|i| Tensor::bytes(&format!("{index}.{i}"), 9000 + i))
            .collect();
        model::write(&file, &tensors, &[]);
        files.push(file);
    }
    let target = |index: usize| format!("b:m{index}");
    let puts: Vec<_> = (0..files.len())
        .map(|index| a.spawn(&["put", text(&files[index]), &target(index)]))
        .collect();
    for put in puts {
        let output = put.wait(genie_tests::GENEROUS);
        assert!(output.status.success(), "{output:?}");
    }
    for (index, file) in files.iter().enumerate() {
        let back = folder.path().join("out.safetensors");
        a.json(&["get", &target(index), text(&back)]);
        assert_eq!(model::read(&back), model::read(file));
    }
    let sessions = b.status()["sessions"].as_array().unwrap().len();
    assert_eq!(sessions, 1, "one session carries them all");
}
